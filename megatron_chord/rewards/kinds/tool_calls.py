"""Equal sets of tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_chord.rewards import tool_calls
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.tool_replies import Think, read_calls


@dataclass(frozen=True, kw_only=True)
class ToolCallsReward(RewardKind):
    """Exactly the true calls, in the form of Qwen, Hermes, Llama 3 or OpenAI: 1 or 0."""

    kind: Literal["tool_calls"] = "tool_calls"
    think: Think = "optional"
    """required: a call is right only after exactly one <think>..</think>, as in the paper's experiments.
    forbidden: only without thinking."""

    EXAMPLE: ClassVar[Response] = Response(text="<think></think><tool_call>[]</tool_call>", truth="[]")

    def load(self) -> Callable[[Response], float]:
        return lambda response: tool_calls.grade(response.text, response.truth, think=self.think)

    def has_answer(self, text: str) -> bool:
        """A complete call in a form that is read."""
        return bool(read_calls(text, think="optional"))
