"""Curves of the runs, as SVG. Needs matplotlib (`pip install 'megatron_chord[plots]'`)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .criteria import Record, Records
from .plan import NAMES

SHOWN = ("grpo", "sft_best_rl", "chord_mu", "chord_phi", "p_weight")
WINDOW = 5
"""The number of steps over which the entropy is averaged."""
Curve = tuple[list[float], list[float]]


def draw(records: Records, folder: Path) -> list[Path]:
    """Write the figures for which there are runs. Thin lines are seeds, the thick one is their mean."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "megatron_chord", "svg.fonttype": "none", "font.size": 9}
    folder.mkdir(parents=True, exist_ok=True)
    figures: Mapping[str, tuple[str, Sequence[str], Callable[[Record], Curve]]] = {
        "sft": ("held-out accuracy, first ability", ("sft",), evaluations("first", "accuracy")),
        "first": ("held-out accuracy, first ability", SHOWN, evaluations("first", "accuracy")),
        "second": ("held-out accuracy, second ability", SHOWN, evaluations("second", "accuracy")),
        "length": ("tokens per answer, first ability", SHOWN, evaluations("first", "length")),
        "entropy": ("entropy at rollout tokens, nats", SHOWN, entropy),
    }
    written = []
    for name, (title, methods, curve) in figures.items():
        present = [method for method in methods if records.get(method)]
        if present:
            written.append(folder / f"{name}.svg")
            _figure(written[-1], title, {method: records[method] for method in present}, curve)
    return written


def evaluations(source: str, name: str) -> Callable[[Record], Curve]:
    def curve(record: Record) -> Curve:
        rows = record["evaluations"]
        return [row["step"] for row in rows], [row[source][name] for row in rows]

    return curve


def entropy(record: Record) -> Curve:
    rows = [row for row in record["steps"] if "entropy" in row]
    parts = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]
    middle = [statistics.fmean(row["step"] for row in part) for part in parts]
    return middle, [statistics.fmean(row["entropy"] for row in part) for part in parts]


def _figure(path: Path, title: str, records: Records, curve: Callable[[Record], Curve]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
    for index, (method, runs) in enumerate(records.items()):
        colour = f"C{index}"
        curves = [curve(run) for run in runs.values()]
        for steps, values in curves:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        steps, mean = mean_curve(curves)
        axes.plot(steps, mean, color=colour, label=NAMES[method])
    axes.set_xlabel("updates")
    axes.set_title(title)
    figure.legend(loc="outside right upper", frameon=False)
    axes.grid(alpha=0.3)
    metadata: dict[str, Any] = {"Date": None}
    figure.savefig(path, metadata=metadata)
    pyplot.close(figure)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over the curves, at the steps that all of them have."""
    common = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    tables = [dict(zip(steps, values, strict=True)) for steps, values in curves]
    return common, [statistics.fmean(table[step] for table in tables) for step in common]
