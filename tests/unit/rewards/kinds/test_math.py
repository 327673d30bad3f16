"""What a mathematics reward accepts as an answer."""

from __future__ import annotations

import pytest

from megatron_chord.rewards.kinds.math import MathReward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{18}", True),
        ("so #### 18", True),
        ("so 18", False),
        ("The answer is 18.", False),
        ("<answer>18</answer>", True),
        (r"so \boxed{18", False),
        (r"so \boxed{ }", False),
        ("so ####", False),
        ("so #### \n18", False),
    ],
)
def test_a_final_answer(text: str, expected: bool) -> None:
    assert MathReward().has_answer(text) == expected
