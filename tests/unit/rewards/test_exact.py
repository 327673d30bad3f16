from __future__ import annotations

import pytest

from megatron_chord.rewards.exact import grade


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("so #### 18", "18", 1.0),
        ("so ####18.", "18", 1.0),
        ("#### $1,000", "1000", 1.0),
        ("#### 1000", "1,000", 1.0),
        ("#### -3.5", "-3.5", 1.0),
        ("#### 17\nno, wait\n#### 18\nindeed", "18", 1.0),
        ("#### 18\n#### 17", "18", 0.0),
        ("#### 18.0", "18", 0.0),
        ("#### 18 eggs", "18", 0.0),
        ("#### the Nile.", "the Nile", 1.0),
        ("#### (1,2)", "(12)", 0.0),
        ("18", "18", 0.0),
        ("", "18", 0.0),
        ("####", "18", 0.0),
        ("#### \n18", "18", 0.0),
        ("#### 18", "5 + 13 = 18\n#### 18", 1.0),
    ],
)
def test_grades(text: str, truth: str, score: float) -> None:
    assert grade(text, truth) == score


def test_marker_is_the_users() -> None:
    assert grade("Answer: yes", "yes", marker="Answer:") == 1.0
    assert grade("#### yes", "yes", marker="Answer:") == 0.0
