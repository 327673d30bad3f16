"""The last boxed answer, or number, compared with the truth by math-verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_chord.config_checks import require
from megatron_chord.rewards.answers import marked_answer
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.response import Response


@dataclass(frozen=True, kw_only=True)
class MathReward(RewardKind):
    """1 if the answer equals the truth, else 0. The answer is in <answer>, in the last box, after the marker or after
    "the answer is", else the last formula or number (docs/grading.md)."""

    kind: Literal["math"] = "math"
    answer_marker: str = "####"
    """An answer without a box is the text after this marker, up to the end of the line."""

    EXAMPLE: ClassVar[Response] = Response(text="\\boxed{x+\\frac{1}{2}}", truth="x+0.5")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.answer_marker != "", "reward.answer_marker is empty")

    def load(self) -> Callable[[Response], float]:
        import sympy.parsing.sympy_parser
        import sympy.physics.units  # noqa: F401 (imported later, it would evaluate names in a comparison)

        from megatron_chord.rewards import math

        return lambda response: math.grade(response.text, response.truth, marker=self.answer_marker)

    def has_answer(self, text: str) -> bool:
        """True if the response marks its answer. A number without a mark does not count."""
        return bool((marked_answer(text, self.answer_marker) or "").strip())
