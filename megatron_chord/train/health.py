"""What the numbers of an update say of its health: updates left out, gradients of 0 or far above the usual."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chord.data.packing import PackedBatch
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.state import NonFiniteGradient
from megatron_chord.train.update import Update, UpdateResult

FOLDER = "nonfinite"
"""Of the run's folder: batches whose update was left out."""
_MOST_SAVED = 20
_REMEMBERED, _LEAST_REMEMBERED = 64, 8
"""Gradient norms that a median is taken of: at most, and at least."""


@dataclass(kw_only=True)
class Health:
    """Equal on every rank; plain JSON in a checkpoint."""

    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list[float])
    """Of the last steps, before clipping; the newest is last."""

    def to_json(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self.skipped_in_a_row, "norms": self.norms}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """None: a checkpoint of before there was any."""
        if saved is not None:
            self.skipped_in_a_row, self.norms = saved["skipped_in_a_row"], list(saved["norms"])

    def left_out(self, error: NonFiniteGradient, *, step: int, allowed: int, where: Path) -> None:
        """Count an update that was left out because of ``error``.

        Raises:
            NonFiniteGradient: it is one more than ``allowed`` in a row.
        """
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > allowed:
            before = f", after {allowed} left out before it" if allowed else ""
            raise NonFiniteGradient(
                f"step {step}: {error}{before} (optim.skip_nonfinite is {allowed}). The batch is in {where}"
            )

    def applied(self) -> None:
        self.skipped_in_a_row = 0

    def norm_ratio(self, norm: float) -> float | None:
        """A step's gradient norm over the median of those before it; none where too few are known. Remembers it."""
        before, self.norms = self.norms, [*self.norms, norm][-_REMEMBERED:]
        usual = statistics.median(before) if len(before) >= _LEAST_REMEMBERED else 0.0
        return norm / usual if usual > 0 else None


def not_finite(result: UpdateResult) -> list[str]:
    """The names of an update's numbers that are NaN or infinite."""
    numbers = {"loss": result.loss, **result.means, **result.maxima}
    return [name for name, value in numbers.items() if not math.isfinite(value)]


def save_batch(
    folder: Path,
    micro_batches: Sequence[PackedBatch],
    update: Update,
    groups: ParallelGroups,
    *,
    step: int,
    number: int,
    reason: str,
) -> Path:
    """Write an update's samples for a report: one JSON file of each data-parallel rank. Returns where. On every rank.

    Of each micro-batch the token ids, where its sequences start, and of each term the trained positions with their
    constants. What is not finite is written as a string. Nothing is written beside ``_MOST_SAVED`` updates.
    """
    target = folder / FOLDER / f"step-{step:06d}-update-{number}"
    is_full = groups.once(lambda: len(list((folder / FOLDER).glob("step-*"))) >= _MOST_SAVED)

    def write() -> None:
        if is_full or not (groups.tensor.rank == groups.pipeline.rank == groups.context.rank == 0):
            return
        target.mkdir(parents=True, exist_ok=True)
        content = {
            "step": step,
            "reason": reason,
            "weights": dict(update.weights),
            "counts": dict(update.counts),
            "micro_batches": [_readable(batch) for batch in micro_batches],
        }
        (target / f"rank-{groups.data.rank}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")

    groups.together(write)
    return target


def _readable(batch: PackedBatch) -> dict[str, Any]:
    return {
        "token_ids": batch.token_ids.tolist(),
        "sequence_starts": batch.cu_seqlens.tolist(),
        "terms": {
            name: {
                "positions": (batch.loss_positions[term.index] + 1).tolist(),
                "constants": {key: _numbers(column) for key, column in term.columns.items()},
            }
            for name, term in batch.terms.items()
        },
    }


def _numbers(column: np.ndarray) -> list[float | str]:
    return [value if math.isfinite(value) else str(value) for value in column.tolist()]
