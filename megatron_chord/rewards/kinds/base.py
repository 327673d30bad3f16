"""What every kind of reward has: its settings, and how its graders are loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_chord.config_checks import not_negative, positive, require
from megatron_chord.rewards.format import FormatRule
from megatron_chord.rewards.response import Response, RowNeeds

Permission = Literal["network", "subprocess", "files"]


@dataclass(frozen=True, kw_only=True)
class OverlongConfig:
    """Soft overlong punishment (DAPO): the reward falls linearly over the last tokens before
    data.max_response_tokens."""

    cache: int
    """Number of tokens over which the reward falls."""
    penalty: float = 1.0
    """Reduction of the reward at the limit."""

    def __post_init__(self) -> None:
        positive(**{"reward.overlong.cache": self.cache})
        not_negative(**{"reward.overlong.penalty": self.penalty})


@dataclass(frozen=True, kw_only=True)
class WholeReward:
    """Settings that hold for a reward as a whole."""

    overlong: OverlongConfig | None = None
    """Lowers the reward of long responses. Default: the reward does not depend on their length."""
    max_error_rate: float = 0.1
    """The run stops if a larger share of the gradings of a step fails."""

    def __post_init__(self) -> None:
        require(
            0 <= self.max_error_rate < 1,
            f"reward.max_error_rate must lie in [0, 1), got {self.max_error_rate}",
        )


@dataclass(frozen=True, kw_only=True)
class RewardKind(WholeReward):
    """Base of the kinds. A kind adds its own settings, ``load`` and ``has_answer``, and sets ``kind``."""

    kind: str = ""
    weight: float = 1.0
    """The reward is multiplied by this. 0: it is measured, but not trained."""
    sources: tuple[str, ...] = ()
    """Names of the data sources whose prompts this reward grades. Default: all."""
    format: FormatRule = "none"
    """Which form a response must have. It changes only the training reward, not evaluations. chord: -1 if the response
    was cut off before a final answer, -0.1 if it is wrong and has not exactly one <think>..</think>. trinity: -0.1 if
    it has not exactly one <think>..</think>, right or wrong."""
    workers: int = 2
    """Processes that grade answers."""
    timeout_s: float = 10.0
    """A grading that takes longer is killed and counted as an error, never as a wrong answer."""
    memory_mb: int = 2048
    """Limit of the address space of one worker, in MiB."""

    EXAMPLE: ClassVar[Response | None] = None
    """A right answer. A worker grades it once at its start, so that modules which are imported late are loaded."""
    RUNS_USERS_CODE: ClassVar[bool] = False
    """True if the grader is not part of this package."""
    NEEDS: ClassVar[RowNeeds] = RowNeeds()
    """What the grader reads of the prompt's row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(math.isfinite(self.weight), f"reward.weight must be a finite number, got {self.weight}")
        positive(
            **{
                "reward.workers": self.workers,
                "reward.timeout_s": self.timeout_s,
                "reward.memory_mb": self.memory_mb,
            }
        )

    @property
    def label(self) -> str:
        """The name of the reward in the metrics."""
        return self.kind

    @property
    def permissions(self) -> frozenset[Permission]:
        """What the workers may do in addition to reading files and computing."""
        return frozenset()

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables that the workers get."""
        return ()

    @property
    def list_size(self) -> int | None:
        """Maximum number of responses in one call of the grader. None: each call has a single response, not a list."""
        return None

    @property
    def calls_at_once(self) -> int:
        """Number of calls of an ``async`` grader that run at the same time in each worker."""
        return 1

    def grades(self, source: str) -> bool:
        """True if this reward grades the prompts of a data source."""
        return not self.sources or source in self.sources

    def load(self) -> Callable[[Any], Any]:
        """Return the grader. Only worker processes call this. Import heavy libraries here, not at the top of the file.

        A grader returns the reward of a response, or several named rewards whose sum is the reward. It raises an
        exception if it cannot grade the response.

        Raises:
            ValueError: the user's settings do not define a grader. The message has the reason.
        """
        raise NotImplementedError

    def error_text(self, error: BaseException) -> str:
        """The text by which messages describe an exception of the grader."""
        return f"{type(error).__name__}: {error}"

    def has_answer(self, text: str) -> bool:
        """True if a response states an answer, in the place where this kind looks for one."""
        raise NotImplementedError
