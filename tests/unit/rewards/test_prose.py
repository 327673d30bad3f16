"""The mathematics grader can compare these truths only as text."""

from __future__ import annotations

import contextlib

import pytest

from megatron_chord.rewards.math import grade
from megatron_chord.rewards.prose import reads_as_text

READ = {
    "15": "15",
    "1,000.5": "1000.5",
    "$-3$": "-3",
    "x^2+1": "1+x^2",
    "\\frac{1}{2}": "0.5",
    "\\boxed{7}": "7",
    "[1,2)": "[1, 2)",
    "90^\\circ": "90",
    "12 \\text{ cm}": "12",
    "2\\sin x\\cos x": "2\\cos x\\sin x",
    "Yes": "Yes",
    "so it is\n#### 3": "3",
}
"""A truth, and a right answer in other words."""
PROSE = {
    "fifteen in all, as both halves are equal": "15",
    "15, because both halves are equal": "15",
    "all integers greater than three": "n > 3",
    "十五个": "15",
}


@pytest.mark.parametrize(("truth", "answer"), READ.items())
def test_truths_that_the_grader_reads(truth: str, answer: str) -> None:
    assert not reads_as_text(truth)
    assert grade(f"\\boxed{{{answer}}}", truth) == 1.0


@pytest.mark.parametrize(("truth", "answer"), PROSE.items())
def test_truths_that_are_text_give_a_right_answer_nothing(truth: str, answer: str) -> None:
    assert reads_as_text(truth)
    with contextlib.suppress(ValueError):  # the grader cannot read it
        assert grade(f"\\boxed{{{answer}}}", truth) == 0.0


@pytest.mark.parametrize("truth", ["C) 15", "(B) x+1", "A. four", "B: 7"])
def test_of_a_choice_with_its_text_both_are_right(truth: str) -> None:
    assert not reads_as_text(truth)
    letter = truth.strip("(")[0]
    for answer in (letter, f"({letter})", truth[2:].strip(") "), truth):
        assert grade(f"\\boxed{{{answer}}}", truth) == 1.0
    assert grade("\\boxed{D}", truth) == grade("\\boxed{1000}", truth) == 0.0


@pytest.mark.parametrize("truth", ["C", "(C)", "P(x) = 2", "ABC"])
def test_a_letter_alone_is_not(truth: str) -> None:
    assert not reads_as_text(truth)
