"""Reads a run's folder: its settings, its training steps and its evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_chord.train.metrics import METRICS, read_metrics

CONFIG = "config.yaml"
Row = Mapping[str, Any]
_Z = 1.96
"""Half the width of a 95 % interval of a normal distribution, in standard errors."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    name: str
    """A short name that is different for each run of a report."""
    folder: Path
    settings: Mapping[str, Any]
    """The resolved settings of config.yaml; empty if the folder has no such file."""
    steps: Sequence[Row]
    """The row of metrics of each training step, in order."""
    evaluations: Sequence[Row]
    """The rows of evaluations, in order. ``step`` is the number of training steps before the evaluation."""


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in ``folders``, finished or not.

    Raises:
        ValueError: a folder holds no run, or a file of it cannot be read.
    """
    names = _short_names([folder.resolve() for folder in folders])
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run wrote to ``path``; empty if there is no such file.

    Raises:
        ValueError: the file cannot be read, or is not a YAML mapping.
    """
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(found).__name__}")
    return found


def interval(evaluation: Row, *, samples: int) -> tuple[float, float]:
    """The 95 % interval of an evaluation's accuracy: the one in the row, or else Wilson's.

    Wilson's interval (J. Am. Stat. Assoc. 22, 1927) treats each graded answer as an independent draw of 0 or 1. With
    several answers to a problem (``samples``) it counts problems, so it is too wide rather than too narrow.
    """
    given = evaluation.get("interval")
    if isinstance(given, Sequence) and len(given) == 2:
        return float(given[0]), float(given[1])
    p = float(evaluation["accuracy"])
    n = float(evaluation["num_problems"]) - float(evaluation.get("num_errors", 0)) / max(samples, 1)
    if n < 1:
        return 0.0, 1.0
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(max(p * (1 - p), 0.0) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _read(folder: Path, name: str) -> RunRecord:
    if not (folder / METRICS).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no run: it has neither {METRICS} nor {CONFIG}")
    rows = read_metrics(folder)
    return RunRecord(
        name=name,
        folder=folder,
        settings=read_settings(folder / CONFIG),
        steps=[row for row in rows if "evaluation" not in row],
        evaluations=[row for row in rows if "evaluation" in row],
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many last parts as are needed to make all names different."""
    longest = max((len(folder.parts) for folder in folders), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}")
