"""Reads the evaluations on suites (``megatron-chord evaluate``) in ``evaluations/`` of a run's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = "evaluations"
_RESULTS = "results.json"


def suite_rows(run: Path) -> list[dict[str, Any]]:
    """One row for each metric of a benchmark and for each mean over benchmarks, for every evaluation of the run.

    Values and bounds are in [0, 1]; None where nothing could be graded. ``step`` is a checkpoint's, otherwise None. A
    file that cannot be read is left out: it may be another program's.
    """
    found: list[dict[str, Any]] = []
    for path in sorted((run / FOLDER).rglob(_RESULTS)):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found += list(_rows(results))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    policy = str(results["policy"]["name"])
    checkpoint = re.search(r"\bstep-(\d+)/*$", policy)
    step = int(checkpoint[1]) if checkpoint is not None else None
    about = {"suite": str(results["suite"]), "policy": policy, "step": step}
    for name, benchmark in results["benchmarks"].items():
        for metric, one in benchmark["metrics"].items():
            yield about | {"benchmark": name, "metric": metric, **_numbers(one)}
    for name, one in results["means"].items():
        yield about | {"benchmark": name, "metric": one["metric"], **_numbers(one)}


def _numbers(one: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.get(name) for name in ("value", "low", "high", "problems")}
