"""The graders by the name that `reward.kind` gives them."""

from __future__ import annotations

from typing import Protocol

from megatron_chord.rewards import exact, math


class Grader(Protocol):
    def __call__(self, text: str, truth: str, *, marker: str) -> float:
        """Reward of a response; raises when it cannot tell. Pure."""
        ...


GRADERS: dict[str, Grader] = {"exact": exact.grade, "math": math.grade}
