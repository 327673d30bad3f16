"""What an exact reward accepts as an answer."""

from __future__ import annotations

import pytest

from megatron_chord.rewards.kinds.exact import ExactReward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so #### 18", True),
        (r"so \boxed{18}", False),
        ("so 18", False),
        ("The answer is 18.", False),
        ("<answer>18</answer>", False),
        (r"so \boxed{18", False),
        (r"so \boxed{ }", False),
        ("so ####", False),
        ("so #### \n18", False),
    ],
)
def test_a_final_answer(text: str, expected: bool) -> None:
    assert ExactReward().has_answer(text) == expected


def test_marker_is_the_users() -> None:
    assert ExactReward(answer_marker="Answer:").has_answer("Answer: 5")
