"""What a reward for tool calls accepts as an answer."""

from __future__ import annotations

import pytest

from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward


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
def test_a_complete_call(text: str, expected: bool) -> None:
    assert ToolCallsReward().has_answer(text) == expected
