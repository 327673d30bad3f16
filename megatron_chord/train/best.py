"""The best evaluation of a run, and how many evaluations ago it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.train.evaluate import Evaluation


@dataclass(kw_only=True)
class Best:
    """Equal on every rank; plain JSON in a checkpoint. The evaluation before the first step does not count."""

    step: int | None = None
    """Optimizer steps of the best weights; None before the first evaluation."""
    value: float | None = None
    since: int = 0
    """Evaluations after it, none of which was better."""

    def note(self, step: int, value: float) -> bool:
        """Whether this is the best so far; an equal value is not."""
        if self.value is not None and value <= self.value:
            self.since += 1
            return False
        self.step, self.value, self.since = step, value, 0
        return True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """None: a checkpoint of before there was any."""
        if saved is not None:
            self.step, self.value, self.since = saved["step"], saved["value"], saved["since"]


def value_of(evaluation: Evaluation, name: str) -> float:
    """What ``checkpoint.keep_best`` compares: ``accuracy``, or that of one source.

    Raises:
        ValueError: none of the source's answers could be graded.
    """
    if name == "accuracy" or not evaluation.accuracy_by_source:
        return evaluation.accuracy
    if name not in evaluation.accuracy_by_source:
        raise ValueError(f"checkpoint.keep_best: no answer of {name} could be graded")
    return evaluation.accuracy_by_source[name]


def is_exhausted(best: Best, run: RunConfig) -> bool:
    """Whether ``evaluation.patience`` ends the run."""
    return run.evaluation.patience is not None and best.since >= run.evaluation.patience
