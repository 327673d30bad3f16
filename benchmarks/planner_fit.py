#!/usr/bin/env python
"""Fit the planner's constants to the fitted rows of planner_rows.yaml, and print them.

    python benchmarks/planner_fit.py

The unseen rows are never read here. The fit minimises the squares of log(predicted / published) over the constants'
logarithms, by damped Gauss-Newton steps with numerical derivatives. A weak pull towards the starting values decides
what the rows leave open. Phases of a step count as rows. Copy the printed values, rounded to three figures, into
megatron_chord/plan/constants.py, and run benchmarks/planner.py.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":  # run as a file, this folder is on the path and the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.planner import rows, summary
from megatron_chord.plan.constants import Constants

START = {
    "bf16_floor": 1.25,
    "bf16_long_floor": 1.25,
    "fp8_floor": 1.3,
    "fp8_long_floor": 0.5,
    "width_cost": 3000.0,
    "tensor_cost": 1000.0,
    "expert_cost": 20000.0,
    "decode_step_s": 6e-3,
    "decode_all_reduce_apart_s": 60e-6,
}
PULL = 0.02
"""Weight of a constant's distance from its start, beside a weight of 1 for each row."""
_STEP = 0.02


def fit(steps: int = 12) -> dict[str, float]:
    """The constants of ``START`` that fit best."""
    names = list(START)
    start = np.log(np.array([START[name] for name in names]))
    found, damping = start.copy(), 0.1
    misses = _misses(names, found, start)
    for _ in range(steps):
        columns = []
        for index in range(len(names)):
            moved = found.copy()
            moved[index] += _STEP
            columns.append((_misses(names, moved, start) - misses) / _STEP)
        slopes = np.stack(columns, axis=1)
        normal = slopes.T @ slopes
        change = -np.linalg.solve(normal + damping * np.diag(normal.diagonal()), slopes.T @ misses)
        tried = found + np.clip(change, -0.5, 0.5)
        after = _misses(names, tried, start)
        if after @ after < misses @ misses:
            found, misses, damping = tried, after, damping / 3
        else:
            damping *= 5
    return dict(zip(names, np.exp(found).tolist(), strict=True))


def _misses(
    names: list[str], logs: NDArray[np.floating], start: NDArray[np.floating]
) -> NDArray[np.floating]:
    values = dict(zip(names, np.exp(logs).tolist(), strict=True))
    seen = rows(dataclasses.replace(Constants(), **values), use="fitted")
    assert all(row.use == "fitted" for row in seen)
    return np.concatenate(
        [[np.log(row.predicted / row.published) for row in seen], np.sqrt(PULL) * (logs - start)]
    )


def main() -> int:
    found = fit()
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    print("fitted:", summary(rows(dataclasses.replace(Constants(), **found), use="fitted")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
