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
    """1 if the reply makes exactly the true calls, in the form of Qwen, Hermes, Llama 3 or OpenAI, else 0."""

    kind: Literal["tool_calls"] = "tool_calls"
    think: Think = "optional"
    """required: the reply must have one </think> before its first call; the prompt may already have the <think>.
    optional: if the reply begins to think, it must also end. forbidden: no <think> and no </think>. Calls within the
    thinking do not count."""

    EXAMPLE: ClassVar[Response] = Response(text="<think></think><tool_call>[]</tool_call>", truth="[]")

    def load(self) -> Callable[[Response], float]:
        return lambda response: tool_calls.grade(response.text, response.truth, think=self.think)

    def has_answer(self, text: str) -> bool:
        """A complete <tool_call>..</tool_call>, whatever is in it, or a call in another form."""
        return "</tool_call>" in text.partition("<tool_call>")[2] or bool(read_calls(text))
