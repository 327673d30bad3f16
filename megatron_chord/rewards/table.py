"""The graders by the name that `reward.kind` gives them."""

from __future__ import annotations

from typing import Protocol

from megatron_chord.rewards import exact, math, tool_calls


class Grader(Protocol):
    def __call__(self, text: str, truth: str, *, marker: str) -> float:
        """Reward of a response; raises when it cannot tell. Pure."""
        ...


GRADERS: dict[str, Grader] = {"exact": exact.grade, "math": math.grade, "tool_calls": tool_calls.grade}

EXAMPLES: dict[str, tuple[str, str]] = {
    "exact": ("#### 1", "1"),
    "math": ("\\boxed{x+\\frac{1}{2}}", "x+0.5"),
    "tool_calls": ("<think></think><tool_call>[]</tool_call>", "[]"),
}
"""A right answer and its truth for each grader: graded once at a worker's start, to import what is imported late."""
