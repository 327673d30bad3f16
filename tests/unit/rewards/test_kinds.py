"""Which text each kind of reward accepts as an answer."""

from __future__ import annotations

import pytest

from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward


@pytest.mark.parametrize(
    ("text", "math", "exact"),
    [
        (r"so \boxed{18}", True, False),
        ("so #### 18", True, True),
        ("so 18", False, False),
        ("The answer is 18.", False, False),
        ("<answer>18</answer>", True, False),
        (r"so \boxed{18", False, False),
        (r"so \boxed{ }", False, False),
        ("so ####", False, False),
        ("so #### \n18", False, False),
    ],
)
def test_final_answers(text: str, math: bool, exact: bool) -> None:
    assert MathReward().has_answer(text) == math
    assert ExactReward().has_answer(text) == exact


def test_marker_is_the_users() -> None:
    assert ExactReward(answer_marker="Answer:").has_answer("Answer: 5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><tool_call>[]</tool_call>", True),
        ("<tool_call>not JSON</tool_call> and more", True),
        ("<tool_call>[", False),
        ("</tool_call><tool_call>", False),
        ("no call", False),
    ],
)
def test_a_complete_call_is_an_answer(text: str, expected: bool) -> None:
    assert ToolCallsReward().has_answer(text) == expected
