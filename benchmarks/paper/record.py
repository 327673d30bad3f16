"""The record of a run: curves of its evaluations and of its steps, read from its folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.train.metrics import SAMPLES, read_metrics

SOURCES = ("first", "second", "transfer")
"""The sources of held-out problems (examples/evidence/common.yaml)."""
MURMURS = frozenset("abde")
OF_A_STEP = (
    "mu",
    "entropy",
    "reward_mean",
    "sft_nll",
    "sft_p",
    "sft_phi",
    "learning_rate",
    "logprob_gap",
    "grad_norm",
)
"""The fields of a row of metrics.jsonl that the record keeps, if the row has them."""


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run.

    Returns:
        ``evaluations``: a row for each evaluation, with ``step`` (updates before it) and for each source ``accuracy``
        [0, 1], ``length`` (tokens), ``murmurs`` (letters without meaning per answer) and ``steps_style`` (share of the
        answers that begin as the demonstrations do). ``steps``: a row for each update, with what ``OF_A_STEP`` names.
    """
    rows = read_metrics(folder)
    return {
        "evaluations": [
            {"step": row["step"], **evaluated(folder, row["step"])} for row in rows if "evaluation" in row
        ],
        "steps": [
            {"step": row["step"], **{name: short(row[name]) for name in OF_A_STEP if name in row}}
            for row in rows
            if "evaluation" not in row
        ],
        "seconds": sum(row["seconds"]["total"] for row in rows if "seconds" in row),
    }


def short(number: float) -> float:
    """Round to five digits, because the record is kept in the repository."""
    return float(f"{number:.5g}")


def evaluated(folder: Path, step: int) -> dict[str, dict[str, float]]:
    """Describe the answers of one evaluation, by source."""
    path = folder / SAMPLES / f"evaluation-{step:06d}.jsonl"
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    by_source = {
        name: [row for row in answers if row["prompt_id"].startswith(f"{name}/")] for name in SOURCES
    }
    return {name: summary(rows) for name, rows in by_source.items() if rows}


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    graded = [row["score"] for row in answers if row["score"] is not None]
    return {
        "accuracy": statistics.fmean(graded),
        "length": statistics.fmean(row["num_tokens"] for row in answers),
        "murmurs": statistics.fmean(sum(letter in MURMURS for letter in row["response"]) for row in answers),
        "steps_style": statistics.fmean(row["response"].startswith("{") for row in answers),
    }
