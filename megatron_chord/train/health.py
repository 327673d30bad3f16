"""Checks of an update's numbers: updates that are skipped, gradients that are 0 or much larger than usual."""

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
"""Subfolder of the run's folder, for the batches of skipped updates."""
_MOST_SAVED = 20
_REMEMBERED, _LEAST_REMEMBERED = 64, 8
"""Maximum and minimum number of gradient norms for the median."""


@dataclass(kw_only=True)
class Health:
    """The recent gradient norms and skipped updates. Equal on every rank; saved in checkpoints as plain JSON."""

    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list[float])
    """Gradient norms of the last steps, before clipping. The newest is the last."""

    def to_json(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self.skipped_in_a_row, "norms": self.norms}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Restore the state from a checkpoint. ``saved`` is None in checkpoints of older versions."""
        if saved is not None:
            self.skipped_in_a_row, self.norms = saved["skipped_in_a_row"], list(saved["norms"])

    def count_skipped(self, error: NonFiniteGradient, *, step: int, allowed: int, where: Path) -> None:
        """Count an update that was skipped because of ``error``.

        Raises:
            NonFiniteGradient: more than ``allowed`` updates in a row were skipped.
        """
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > allowed:
            before = f", after {allowed} skipped updates" if allowed else ""
            raise NonFiniteGradient(
                f"step {step}: {error}{before} (optim.skip_nonfinite is {allowed}). The batch is in {where}"
            )

    def count_applied(self) -> None:
        self.skipped_in_a_row = 0

    def norm_ratio(self, norm: float) -> float | None:
        """Divide a step's gradient norm by the median of the earlier norms, then store it. None if there are too
        few."""
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
    """Write the samples of an update, for a bug report: one JSON file from each data-parallel rank. On every rank.

    A file has for each micro-batch the token ids and the starts of its sequences, and for each term the trained
    positions with their constants; and the same of the teachers' sequences, if there are any. Numbers that are not
    finite are written as strings. At most ``_MOST_SAVED`` updates are written in a run.

    Returns:
        the folder.
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
        "prompt_sequences": batch.prompts.tolist(),
        "terms": {
            name: {
                "positions": (batch.loss_positions[term.index] + 1).tolist(),
                "constants": {key: _numbers(column) for key, column in term.columns.items()},
            }
            for name, term in batch.terms.items()
        },
        **({} if batch.teacher is None else {"teacher": _readable(batch.teacher.batch)}),
    }


def _numbers(column: np.ndarray) -> list[float | str]:
    return [value if math.isfinite(value) else str(value) for value in column.tolist()]
