"""Doubtful truths are counted, and an example of each kind is shown."""

from __future__ import annotations

from megatron_chord.data.truths import conflicting, doubts
from megatron_chord.records import Prompt


def prompt(number: int, token: int, truth: str) -> Prompt:
    return Prompt(id=f"train.jsonl:{number}", messages=(), truth=truth, token_ids=(token,))


def test_a_problem_with_two_truths_is_named_once() -> None:
    rows = [prompt(1, 7, "15"), prompt(2, 8, "3"), prompt(3, 7, "16"), prompt(4, 7, "17"), prompt(5, 8, "3")]
    assert [(first.id, other.id) for first, other in conflicting(rows)] == [
        ("train.jsonl:1", "train.jsonl:3")
    ]
    assert doubts(rows) == ["1 problem has several truths, e.g. train.jsonl:1 '15' and train.jsonl:3 '16'"]


def test_truths_that_are_the_same_number_do_not_conflict() -> None:
    rows = [
        prompt(1, 7, "1000"),
        prompt(2, 7, " 1,000 "),
        prompt(3, 7, "1000.0"),
        prompt(4, 8, "x"),
        prompt(5, 8, "x "),
    ]
    assert conflicting(rows) == []


def test_truths_that_are_text_are_counted_for_graders_of_mathematics() -> None:
    rows = [prompt(1, 1, "15"), prompt(2, 2, "C) 15"), prompt(3, 3, "p" * 99)]
    found = doubts(rows, lambda prompt: not prompt.truth.isdecimal())
    assert found == [
        "2 of 3 truths are read as text, e.g. train.jsonl:2 'C) 15': a right answer in other words gets reward 0"
    ]
    assert doubts(rows) == []
