"""Equal sets of tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_chord.rewards import tool_calls
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.response import Response


@dataclass(frozen=True, kw_only=True)
class ToolCallsReward(RewardKind):
    """Exactly the true calls in the last <tool_call>, after one <think>..</think>: 1 or 0."""

    kind: Literal["tool_calls"] = "tool_calls"

    EXAMPLE: ClassVar[Response] = Response(text="<think></think><tool_call>[]</tool_call>", truth="[]")

    def load(self) -> Callable[[Response], float]:
        return lambda response: tool_calls.grade(response.text, response.truth)

    def has_answer(self, text: str) -> bool:
        """A complete <tool_call>..</tool_call>, whatever is in it."""
        return "</tool_call>" in text.partition("<tool_call>")[2]
