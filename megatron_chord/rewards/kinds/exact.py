"""Equal text after the answer marker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_chord.config_checks import require
from megatron_chord.rewards import exact
from megatron_chord.rewards.answers import after_marker
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.response import Response


@dataclass(frozen=True, kw_only=True)
class ExactReward(RewardKind):
    """1 if the text after the last marker equals the truth, else 0."""

    kind: Literal["exact"] = "exact"
    answer_marker: str = "####"
    """The answer is the text after this marker, up to the end of the line."""

    EXAMPLE: ClassVar[Response] = Response(text="#### 1", truth="1")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.answer_marker != "", "reward.answer_marker is empty")

    def load(self) -> Callable[[Response], float]:
        return lambda response: exact.grade(response.text, response.truth, marker=self.answer_marker)

    def has_answer(self, text: str) -> bool:
        return bool((after_marker(text, self.answer_marker) or "").strip())
