"""Prompts are matched with demonstrations by their tokens. Prompts without one are an error or are left out."""

from __future__ import annotations

import re

import pytest

from megatron_chord.data.align import align
from megatron_chord.data.rows import DataError
from megatron_chord.records import Demonstration, Prompt


def prompt(name: str, *token_ids: int) -> Prompt:
    return Prompt(id=name, messages=({"role": "user", "content": name},), truth="", token_ids=token_ids)


def demonstration(name: str, token_ids: list[int], trainable: str) -> Demonstration:
    """``trainable`` has an x for each token that the demonstration wrote."""
    return Demonstration(
        id=name, token_ids=tuple(token_ids), trainable=tuple(letter == "x" for letter in trainable)
    )


ONE, TWO = prompt("one", 1, 2), prompt("two", 1, 2, 3)
OF_ONE, OF_TWO = demonstration("of one", [1, 2, 3, 4], "..xx"), demonstration("of two", [1, 2, 3, 4], "...x")


def names(found: tuple[list[Prompt], dict[str, Demonstration]]) -> tuple[list[str], dict[str, str]]:
    prompts, demonstrations = found
    return [prompt.id for prompt in prompts], {
        key: demonstration.id for key, demonstration in demonstrations.items()
    }


@pytest.mark.parametrize("unmatched", ["fail", "drop"])
def test_a_prompt_ends_where_the_demonstrated_answer_begins(unmatched: str) -> None:
    # Both demonstrations have the same tokens. They differ in the place where the prompt ends.
    found = align([TWO, ONE], [OF_ONE, OF_TWO], unmatched=unmatched)  # type: ignore[arg-type]
    assert names(found) == (["two", "one"], {"one": "of one", "two": "of two"})
    assert found[1]["one"] is OF_ONE


def test_the_first_of_several_demonstrations() -> None:
    demonstrations = [
        OF_TWO,
        demonstration("first", [1, 2, 9], "..x"),
        OF_ONE,
        demonstration("last", [1, 2, 8], "..x"),
    ]
    assert names(align([ONE], demonstrations, unmatched="fail")) == (["one"], {"one": "first"})


def test_equal_prompts_share_a_demonstration() -> None:
    again = prompt("again", 1, 2)
    assert names(align([ONE, again], [OF_ONE], unmatched="fail")) == (
        ["one", "again"],
        {"one": "of one", "again": "of one"},
    )


def test_demonstrations_of_several_turns_are_no_answers() -> None:
    turns = demonstration("turns", [1, 2, 5, 3, 6], "..x.x")
    with pytest.raises(DataError, match=r"1 of 1 prompts have no demonstration .* \(one\)"):
        align([ONE], [turns], unmatched="fail")
    assert names(align([ONE], [turns, OF_ONE], unmatched="fail")) == (["one"], {"one": "of one"})


def test_tokens_after_the_answer_do_not_make_it_two() -> None:
    assert names(align([ONE], [demonstration("tail", [1, 2, 5, 6, 0], "..xx.")], unmatched="fail"))[1] == {
        "one": "tail"
    }


@pytest.mark.parametrize(
    "other",
    [
        demonstration("shorter", [1, 5], ".x"),
        demonstration("other prompt", [2, 2, 5], "..x"),
        demonstration("longer", [1, 2, 3, 5], "...x"),
        demonstration("without a prompt", [1, 2, 5], "xxx"),
    ],
    ids=lambda other: other.id,
)
def test_near_misses(other: Demonstration) -> None:
    with pytest.raises(DataError, match="1 of 1 prompts"):
        align([ONE], [other], unmatched="drop")


def test_missing_demonstrations_are_named() -> None:
    prompts = [prompt(f"p{i}", i, i) for i in range(5)]
    message = "data.aligned: 5 of 6 prompts have no demonstration of the same problem in data.demonstrations "
    with pytest.raises(DataError, match=re.escape(message + "(p0, p1, p2, p3, p4);")):
        align([ONE, *prompts], [OF_ONE], unmatched="fail")
    with pytest.raises(DataError, match=re.escape("6 of 7") + r".*\(p0, p1, p2, p3, p4, \.\.\.\)"):
        align([*prompts, ONE, prompt("p5", 7)], [OF_ONE], unmatched="fail")


def test_missing_demonstrations_are_left_out() -> None:
    prompts = [prompt("before", 8), ONE, prompt("between", 9), TWO]
    assert names(align(prompts, [OF_TWO, OF_ONE], unmatched="drop")) == (
        ["one", "two"],
        {"one": "of one", "two": "of two"},
    )


@pytest.mark.parametrize("unmatched", ["fail", "drop"])
@pytest.mark.parametrize("demonstrations", [[], [OF_TWO]], ids=["none at all", "none that fits"])
def test_no_prompt_is_left(unmatched: str, demonstrations: list[Demonstration]) -> None:
    with pytest.raises(DataError, match="drop leaves them out"):
        align([ONE], demonstrations, unmatched=unmatched)  # type: ignore[arg-type]
