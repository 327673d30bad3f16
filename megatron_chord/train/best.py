"""The best evaluation of a run, and how many evaluations ago it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_chord.train.evaluate import Evaluation


@dataclass(kw_only=True)
class Best:
    """The best evaluation so far. Equal on every rank; plain JSON in a checkpoint.

    The evaluation before the first step does not count.
    """

    step: int | None = None
    """Number of steps after which the best weights were evaluated; None before the first evaluation."""
    value: float | None = None
    since: int = 0
    """Number of evaluations after the best one."""

    def note(self, step: int, value: float) -> bool:
        """Record an evaluation. Returns whether it is better than all earlier ones."""
        if self.value is not None and value <= self.value:
            self.since += 1
            return False
        self.step, self.value, self.since = step, value, 0
        return True

    def is_exhausted(self, patience: int | None) -> bool:
        """True if ``patience`` evaluations in a row were no better (``evaluation.patience``); never if it is None."""
        return patience is not None and self.since >= patience

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Restore the state from a checkpoint. ``saved`` is None in checkpoints of older versions."""
        if saved is not None:
            self.step, self.value, self.since = saved["step"], saved["value"], saved["since"]


def value_in(found: Mapping[str, Evaluation], name: str) -> float | None:
    """The number that ``checkpoint.keep_best`` compares. ``found`` has the evaluations of one step, by the names of
    their sets.

    Returns:
        The number; None if its set was not evaluated at this step.

    Raises:
        ValueError: none of the answers could be graded.
    """
    if "" in found:
        return value_of(found[""], name)
    of, _, metric = name.rpartition(".")
    if of not in found:
        return None
    if metric not in found[of].metrics:
        raise ValueError(f"checkpoint.keep_best: no problem of {of} has {metric}: too many gradings failed")
    return found[of].metrics[metric]


def value_of(evaluation: Evaluation, name: str) -> float:
    """The accuracy if ``name`` is ``accuracy``, otherwise the accuracy of the source ``name`` of ``data.evaluation``.

    Raises:
        ValueError: none of the source's answers could be graded.
    """
    if name == "accuracy" or not evaluation.accuracy_by_source:
        return evaluation.accuracy
    if name not in evaluation.accuracy_by_source:
        raise ValueError(f"checkpoint.keep_best: no answer of {name} could be graded")
    return evaluation.accuracy_by_source[name]
