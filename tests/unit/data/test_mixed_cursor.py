"""Over several data sets, shares are right from the first item on, and a restored cursor continues exactly."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from megatron_chord.data.cursor import Cursor
from megatron_chord.data.mixed_cursor import MixedCursor, cursor_over
from megatron_chord.records import Prompt

SIZES = {"a": 5, "b": 3, "c": 11}


def prompts(**sizes: int) -> list[Prompt]:
    return [
        Prompt(id=f"{source}{i}", messages=(), truth="", token_ids=(i,), source=source)
        for source, size in sizes.items()
        for i in range(size)
    ]


def mixed(weights: dict[str, float], *, seed: int = 0) -> MixedCursor:
    records = prompts(**{source: SIZES[source] for source in weights})
    cursor = cursor_over("prompts", records, weights, seed=seed)
    assert isinstance(cursor, MixedCursor)
    return cursor


def sources_of(indices: list[int], weights: dict[str, float]) -> str:
    records = prompts(**{source: SIZES[source] for source in weights})
    return "".join(records[index].source for index in indices)


@pytest.mark.parametrize(
    ("weights", "order"),
    [
        # Items are due at 1/6, 3/6, 5/6, ... and at 1/2, 3/2, ... Of equal times the first data set wins.
        ({"a": 3, "b": 1}, "aabaaabaaaba"),
        ({"a": 1, "b": 1}, "abababab"),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, "abcaabcaabca"),
        ({"a": 0.1, "b": 0.3}, "babbbabb"),
    ],
)
def test_the_order_by_hand(weights: dict[str, float], order: str) -> None:
    indices, _ = mixed(weights).take(len(order))
    assert sources_of(indices, weights) == order


@pytest.mark.parametrize(
    "weights", [{"a": 3, "b": 1}, {"a": 0.7, "b": 0.2, "c": 0.137}, {"a": 1e-3, "b": 99}]
)
def test_every_source_keeps_its_share_over_many_steps(weights: dict[str, float]) -> None:
    names, total = list(weights), sum(map(Fraction, map(str, weights.values())))
    order = sources_of(mixed(weights).take(1500)[0], weights)
    counts: Counter[str] = Counter()
    for number, source in enumerate(order, start=1):
        counts[source] += 1
        for name in names:
            share = number * Fraction(str(weights[name])) / total
            assert abs(counts[name] - share) <= Fraction(len(names) + 1, 2)


def test_every_source_keeps_its_own_order() -> None:
    weights = {"a": 2.0, "b": 1.0, "c": 3.0}
    cursor = mixed(weights)
    indices, _ = cursor.take(120)
    for part, start in zip(cursor.parts, (0, 5, 8), strict=True):
        own = [index - start for index in indices if start <= index < start + part.size]
        assert own == part.take(len(own))[0]
    assert len({part.name for part in cursor.parts}) == 3
    other, _ = mixed(weights, seed=1).take(120)
    assert sources_of(other, weights) == sources_of(indices, weights)
    assert other != indices


def test_steps_of_any_size_and_a_checkpoint_after_each_give_one_order() -> None:
    weights = {"a": 3.0, "b": 1.5}
    straight, _ = mixed(weights).take(70)
    at, taken = mixed(weights), []
    for count in (1, 2, 0, 7, 20, 40):
        indices, at = at.take(count)
        taken += indices
        at = mixed(weights).restored(json.loads(json.dumps(at.state())))
    assert taken == straight
    assert [mixed(weights).index_at(position) for position in range(70)] == straight


def test_a_checkpoint_holds_the_cursor_of_each_source() -> None:
    _, after = mixed({"a": 3.0, "b": 1.0}).take(8)
    state = after.state()
    assert state["position"] == 8
    assert [(part["name"], part["position"]) for part in state["sources"]] == [
        ("prompts/a", 6),
        ("prompts/b", 2),
    ]
    assert state["weights"] == ["3", "1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": {"a": 3.0, "b": 2.0}}, "the weights were 3, 1 and are 3, 2"),
        (
            {"weights": {"a": 3.0, "c": 1.0}},
            "the sources were prompts/a, prompts/b, now prompts/a, prompts/c",
        ),
        ({"weights": {"a": 3.0, "b": 1.0}, "seed": 1}, "the run has another seed"),
        ({"weights": {"a": 1.0}}, "prompts: the checkpoint was written with 2 sources, and there is one now"),
    ],
)
def test_a_checkpoint_of_other_sources_is_refused(change: dict[str, Any], reason: str) -> None:
    state = json.loads(json.dumps(mixed({"a": 3.0, "b": 1.0}).take(9)[1].state()))
    records = prompts(**{source: SIZES[source] for source in change["weights"]})
    now = cursor_over("prompts", records, change["weights"], seed=change.get("seed", 0))
    with pytest.raises(ValueError, match=reason):
        now.restored(state)


def test_states_that_no_run_wrote_are_refused() -> None:
    cursor = mixed({"a": 3.0, "b": 1.0})
    state = cursor.take(9)[1].state()
    with pytest.raises(ValueError, match="do not fit each other"):
        cursor.restored(state | {"position": 10})
    with pytest.raises(ValueError, match="written with one source, and there are 2 now"):
        cursor.restored(replace(cursor.parts[0], position=3).state())


def test_one_source_is_a_plain_cursor_whatever_its_name() -> None:
    cursor = cursor_over("prompts", prompts(a=5), {"a": 2.0}, seed=4)
    assert isinstance(cursor, Cursor)
    assert cursor.name == "prompts"


def test_a_source_without_rows_is_named() -> None:
    with pytest.raises(ValueError, match=r"data.prompts: no usable row is left in b"):
        cursor_over("prompts", prompts(a=5), {"a": 1.0, "b": 1.0}, seed=0)
