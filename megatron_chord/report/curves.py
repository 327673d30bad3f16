"""The curves of a report and their points: at most ``MOST_POINTS`` each, independent of the run's length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_chord.report.folder import Row, RunRecord, interval
from megatron_chord.settings_tree import setting
from megatron_chord.train.tags import scalars

MOST_POINTS = 1000
_OWN_PLACE = ("step", "seconds", "weight_version", "gpus")
"""Keys and blocks of a row that have no curve of their own."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    group: str
    title: str
    metrics: tuple[str, ...]
    """Names of the metrics in metrics.jsonl; ``block/name`` for a number in a block."""
    help: str
    unit: Literal["", "%", "tokens", "s"] = ""
    log: bool = False


CHARTS = (
    Chart(
        group="Learning",
        title="Reward",
        metrics=("reward_mean",),
        help="Mean over the step's graded answers.",
    ),
    Chart(
        group="Learning",
        title="Answer length",
        metrics=("response_length",),
        unit="tokens",
        help="Mean tokens of an answer.",
    ),
    Chart(
        group="Learning",
        title="Truncated answers",
        metrics=("truncated_fraction",),
        unit="%",
        help="Share of answers that reached data.max_response_tokens.",
    ),
    Chart(
        group="Learning",
        title="Groups with equal rewards",
        metrics=("equal_reward_groups",),
        unit="%",
        help="Share of prompts whose answers all have the same reward. They give no policy gradient.",
    ),
    Chart(
        group="Learning",
        title="Entropy",
        metrics=("entropy",),
        help="Of the policy at sampled tokens, in nats a token.",
    ),
    Chart(
        group="Demonstrations",
        title="mu",
        metrics=("mu",),
        help="Weight of the SFT loss. The policy loss has the weight 1 - mu.",
    ),
    Chart(
        group="Demonstrations",
        title="SFT loss",
        metrics=("sft_loss",),
        help="Mean over demonstration tokens, each with its token weight.",
    ),
    Chart(
        group="Demonstrations",
        title="Policy loss",
        metrics=("policy_loss",),
        help="Mean over answer tokens. It does not measure progress: read the reward and the accuracy.",
    ),
    Chart(
        group="Demonstrations",
        title="p and phi of demonstration tokens",
        metrics=("sft_p", "sft_phi"),
        help="p: probability that the policy gives the token. phi = p (1 - p): large where the policy is undecided.",
    ),
    Chart(
        group="Demonstrations",
        title="Demonstration negative log-likelihood",
        metrics=("sft_nll",),
        help="Mean -log p of demonstration tokens, in nats.",
    ),
    Chart(
        group="Stability",
        title="Gradient norm",
        metrics=("grad_norm",),
        log=True,
        help="Of the whole model, before clipping.",
    ),
    Chart(
        group="Stability",
        title="Log-prob gap",
        metrics=("logprob_gap",),
        log=True,
        help="Mean difference between trainer and vLLM for the same tokens, in nats. It should not grow.",
    ),
    Chart(
        group="Stability",
        title="Clipped tokens",
        metrics=("clip_fraction", "dual_clip_fraction"),
        unit="%",
        help="Share of answer tokens whose ratio is clipped: they give no gradient.",
    ),
    Chart(
        group="Stability",
        title="Importance correction",
        metrics=("correction_weight", "correction_outside"),
        help="Mean weight of answer tokens from other weights, and the share of them outside the bounds.",
    ),
    Chart(group="Stability", title="KL to the reference", metrics=("kl",), help="In nats a token."),
    Chart(
        group="Stability",
        title="Staleness",
        metrics=("staleness_mean", "staleness_max"),
        help="Optimizer steps between the weights that sampled a token and the weights that are trained.",
    ),
    Chart(
        group="Speed",
        title="Tokens per second",
        metrics=("tokens_per_s",),
        help="Prompts included, over the whole step.",
    ),
    Chart(
        group="Speed",
        title="Model FLOPs utilization (MFU)",
        metrics=("mfu",),
        unit="%",
        help="Of the training part of a step, as a share of the GPU's BF16 peak.",
    ),
    Chart(
        group="Speed",
        title="TFLOP/s of a rank",
        metrics=("tflops_per_gpu",),
        help="Of the training part of a step.",
    ),
)
BLOCKS = {
    "reward": Chart(
        group="Learning",
        title="Reward by source",
        metrics=(),
        help="Mean over the step's graded answers to the prompts of each source.",
    ),
    "accuracy": Chart(
        group="Learning",
        title="Score by source",
        metrics=(),
        help="Mean of the grader's score alone, over the same answers as the reward by source.",
    ),
    "reward_terms": Chart(
        group="Learning",
        title="Reward terms",
        metrics=(),
        help="Mean of each term without its weight, and of each named part.",
    ),
    "prompts": Chart(group="More", title="Prompts by source", metrics=(), help="Prompts of the step."),
}
"""One chart for each block of a row. Its metrics are the block's numbers, ``block/name``, which differ from run to
run."""
PHASES = ("waiting", "weight push", "sampling", "grading", "packing", "training", "other")


def all_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The charts of ``CHARTS`` and ``BLOCKS`` for which a run has numbers, then one chart for each other number or
    block."""
    present = {name for run in runs for row in run.steps for name in _numbers(row)}
    shown = {name for chart in CHARTS for name in chart.metrics} | set(_OWN_PLACE)
    by_block: dict[str, list[str]] = {}
    for name in sorted(present):
        block = name.partition("/")[0]
        if block not in shown:
            by_block.setdefault(block, []).append(name)
    known = [chart for chart in CHARTS if present & set(chart.metrics)]
    known += [
        replace(chart, metrics=tuple(by_block[block])) for block, chart in BLOCKS.items() if block in by_block
    ]
    more = [
        Chart(group="More", title=name, metrics=tuple(names), help="See docs/running.md and docs/methods.md.")
        for name, names in by_block.items()
        if name not in BLOCKS
    ]
    return known + more


def curves(run: RunRecord, charts: Sequence[Chart], *, most_points: int = MOST_POINTS) -> dict[str, Any]:
    """The points of a run: ``x`` (step, tokens, hours), ``series`` by metric, ``phases``, and ``evaluations`` with the
    accuracy of each set.

    With more steps than ``most_points``, a point represents several consecutive steps: ``mean``, with ``low`` and
    ``high``, so that a single outlier stays visible. A point without a measurement is None. Tokens and hours are
    counted from the start of the run.
    """
    size = max(1, math.ceil(len(run.steps) / most_points))
    parts = [run.steps[start : start + size] for start in range(0, len(run.steps), size)]
    numbers = [[_numbers(row) for row in part] for part in parts]
    totals = _totals(run.steps)
    last = [totals[min(start + size, len(totals)) - 1] for start in range(0, len(totals), size)]
    names = dict.fromkeys(name for chart in charts for name in chart.metrics)
    return {
        "x": {
            "step": [part[-1]["step"] + 1 for part in parts],
            "tokens": [_rounded(tokens) for tokens, _ in last],
            "hours": [_rounded(hours) for _, hours in last],
        },
        "series": {
            name: found
            for name in names
            if (found := _series([[row[name] for row in part if name in row] for part in numbers]))
        },
        "phases": _phases(run, parts),
        "evaluations": _evaluations(run, totals),
    }


def totals(run: RunRecord) -> tuple[float, float]:
    """Tokens that passed through the model and hours of training steps, of the whole run."""
    return _totals(run.steps)[-1] if run.steps else (0.0, 0.0)


def _totals(steps: Sequence[Row]) -> list[tuple[float, float]]:
    """Total tokens and hours after each step."""
    seconds = [float(row.get("seconds", {}).get("total", 0.0)) for row in steps]
    tokens = [float(row.get("tokens_per_s", 0.0)) * took for row, took in zip(steps, seconds, strict=True)]
    return [
        (sum_of_tokens, sum_of_seconds / 3600)
        for sum_of_tokens, sum_of_seconds in zip(
            itertools.accumulate(tokens), itertools.accumulate(seconds), strict=True
        )
    ]


def _numbers(row: Row) -> dict[str, float]:
    return {name: float(value) for name, value in scalars(row) if math.isfinite(value)}


def _series(numbers: Sequence[Sequence[float]]) -> dict[str, list[float | None]] | None:
    if not any(numbers):
        return None
    found = {"mean": [_rounded(sum(part) / len(part)) if part else None for part in numbers]}
    if any(len(part) > 1 for part in numbers):
        found["low"] = [_rounded(min(part)) if part else None for part in numbers]
        found["high"] = [_rounded(max(part)) if part else None for part in numbers]
    return found


def _phases(run: RunRecord, parts: Sequence[Sequence[Row]]) -> dict[str, list[float]]:
    """Seconds of each phase of a step. Their sum is the total of the step."""
    ahead = setting(run.settings, "rollout.asynchronous") is not None
    rows = [[_phases_of(row.get("seconds", {}), ahead=ahead) for row in part] for part in parts]
    found = {
        phase: [_rounded(sum(row[phase] for row in part) / len(part)) for part in rows] for phase in PHASES
    }
    return {phase: values for phase, values in found.items() if any(values)}


def _phases_of(seconds: Mapping[str, float], *, ahead: bool) -> dict[str, float]:
    """The phases of one step. ``ahead``: its rollouts were sampled while the previous step trained, so that this step
    only waited for them."""
    collect, train, total = (float(seconds.get(name, 0.0)) for name in ("collect", "train", "total"))
    found = dict.fromkeys(PHASES, 0.0) | {"training": train, "other": max(0.0, total - collect - train)}
    if ahead:
        return found | {"waiting": collect}
    rest = collect
    # The first push of a run belongs to the evaluation before it, so a part never exceeds what is left.
    for phase, name in (
        ("sampling", "sample"),
        ("grading", "grade"),
        ("packing", "pack"),
        ("weight push", "sync"),
    ):
        found[phase] = min(float(seconds.get(name, 0.0)), rest)
        rest -= found[phase]
    return found | {"other": found["other"] + rest}


def _evaluations(run: RunRecord, totals: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """``name`` and ``points`` of each evaluated set. The name is empty for the problems of ``data.evaluation``."""
    at = _where(run, totals)
    samples_of = {name: samples for name, samples, _ in _sets(run)}
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in samples_of}
    for row in run.evaluations:
        for name, evaluation in _by_set(run, row).items():
            if name not in points or not _is_number(evaluation.get("accuracy")):
                continue
            low, high = interval(evaluation, samples=samples_of[name])
            points[name].append(
                at(row["step"])
                | {
                    "accuracy": _rounded(evaluation["accuracy"]),
                    "low": _rounded(low),
                    "high": _rounded(high),
                    "problems": evaluation.get("num_problems"),
                    "length": _rounded(float(evaluation.get("response_length", 0.0))),
                }
            )
    return [{"name": name, "points": found} for name, found in points.items() if found]


def _sets(run: RunRecord) -> list[tuple[str, int, Sequence[str]]]:
    """Name, number of samples and metrics of each evaluated set, in the order of the settings."""
    samples = setting(run.settings, "evaluation.samples", 1)
    sets = setting(run.settings, "evaluation.sets", None)
    if not sets:
        return [("", int(samples), ())]
    return [
        (item["name"], int(item.get("samples") or samples), tuple(item.get("metrics") or ())) for item in sets
    ]


def _by_set(run: RunRecord, row: Row) -> Mapping[str, Row]:
    """The evaluations of a row, by the name of their set."""
    has_sets = bool(setting(run.settings, "evaluation.sets", None))
    return row["evaluation"] if has_sets else {"": row["evaluation"]}


def evaluation_lines(run: RunRecord, suites: Sequence[Row]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Further charts of evaluations: by title the lines, each a list of points in order of ``step``.

    These are the held-out accuracy of each source of a set, the metrics of ``evaluation.sets``, and each metric of a
    suite on which several checkpoints of the run were evaluated.

    Args:
        suites: as ``suite_rows`` returns them.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}

    def note(title: str, line: str, step: int, value: Any) -> None:
        if _is_number(value):
            found.setdefault(title, {}).setdefault(line, {})[step] = value

    for row in run.evaluations:
        by_set = _by_set(run, row)
        for name, samples, metrics in _sets(run):
            evaluation = by_set.get(name, {})
            for source, value in evaluation.get("accuracy_by_source", {}).items():
                note("Held-out accuracy by source", f"{name} {source}".lstrip(), row["step"], value)
            for metric in metrics or (f"avg@{samples}",):
                note(
                    "Metrics of the evaluation sets", f"{name} {metric}", row["step"], evaluation.get(metric)
                )
    steps = {(row["suite"], row["step"]) for row in suites if row["step"] is not None}
    several = {suite for suite, _ in steps if sum(other == suite for other, _ in steps) > 1}
    for row in suites:
        if row["suite"] in several and row["step"] is not None:
            note(f"Suite {row['suite']}", f"{row['benchmark']} {row['metric']}", row["step"], row["value"])
    at = _where(run, _totals(run.steps))
    return {
        title: {
            line: [at(step) | {"value": _rounded(value)} for step, value in sorted(points.items())]
            for line, points in lines.items()
        }
        for title, lines in found.items()
    }


def _where(run: RunRecord, totals: Sequence[tuple[float, float]]) -> Callable[[int], dict[str, float]]:
    """The place of a number of steps on each of the horizontal axes."""
    done = {row["step"] + 1: total for row, total in zip(run.steps, totals, strict=True)}

    def at(step: int) -> dict[str, float]:
        tokens, hours = done.get(step, (0.0, 0.0))
        return {"step": step, "tokens": _rounded(tokens), "hours": _rounded(hours)}

    return at


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rounded(value: float) -> float:
    """Round to five digits, which is more than a screen shows."""
    return float(f"{value:.5g}")
