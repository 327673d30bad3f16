"""Which part of a response is the answer, and which answers count as equal."""

from __future__ import annotations

import pytest

from megatron_chord.rewards.math import grade


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        # The place of the answer: the box, then the marker, then the last number.
        (r"first \boxed{1}, no: \boxed{2}", "2", 1.0),
        (r"first \boxed{2}, no: \boxed{1}", "2", 0.0),
        (r"\boxed{2} #### 3, or 4", "2", 1.0),
        (r"\boxed {2}", "2", 1.0),
        (r"\boxed{\boxed{2}}", "2", 1.0),
        (r"\boxed{2} and then \boxed{3", "2", 1.0),
        (r"\boxed{\frac{1}{2}} is it", r"\frac12", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{\left\{ 3 \right.}", "4", 0.0),
        ("5 of 7\n#### 12 \nor 13", "12", 1.0),
        ("#### $1,250.", "1250", 1.0),
        ("It takes 3 and then 4 hours.", "4", 1.0),
        ("It is 1,234.50 dollars", "1234.5", 1.0),
        ("so x=-3", "-3", 1.0),
        ("5-3", "3", 1.0),
        ("nothing to see", "0", 0.0),
        ("", "0", 0.0),
        (r"\boxed{}", "0", 0.0),
        # Equal answers.
        (r"\boxed{142}", "142.0", 1.0),
        (r"\boxed{0.5}", "1/2", 1.0),
        (r"\boxed{0.3333333}", r"\frac{1}{3}", 1.0),
        (r"\boxed{0.33}", r"\frac{1}{3}", 0.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
        (r"\boxed{q-p}", "p - q", 0.0),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
        (r"\boxed{(\pi/2, 3)}", r"\left( 3, \frac{\pi}{2} \right)", 0.0),
        (r"\boxed{\text{east}}", r"\text{east}", 1.0),
        (r"\boxed{\text{west}}", r"\text{east}", 0.0),
        (r"\boxed{18}", "so it is 18.\n#### 18", 1.0),
        (r"\boxed{" + "9" * 5000 + "}", "9", 0.0),
    ],
)
def test_grades(text: str, truth: str, score: float) -> None:
    assert grade(text, truth) == score


@pytest.mark.parametrize("truth", ["", " ", r"\boxed{}"])
def test_truth_that_cannot_be_read_is_no_wrong_answer(truth: str) -> None:
    with pytest.raises(ValueError, match="the truth"):
        grade(r"\boxed{1}", truth)


def test_marker_is_the_users() -> None:
    assert grade("Answer: 3 of 4\nnot 5", "3", marker="Answer:") == 0.0
    assert grade("Answer: 3\nnot 5", "3", marker="Answer:") == 1.0
