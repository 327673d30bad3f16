"""Measure the time of a step whose rollouts are sampled before it trains, or while the previous step trains.

    python benchmarks/overlap.py [--steps 12] [--repeats 2] [--prompts 16] [--rollouts 8] [--threads 1] [--output FILE]

The runs use the quick start's policy and problems, and one vLLM server to which every run pushes its own weights. They
are without ``rollout.asynchronous``, with it, and with its ``in_flight: keep``, in turn and ``--repeats`` times. Each
runs in a process of its own, with ``--threads`` threads for the trainer and as many for the server. The numbers are
medians over the steps of all repeats, without the first two steps of each run. ``best`` is what perfect overlap would
give: the longer of sampling and training without overlap, plus the push of weights, which overlaps with neither. It
cannot be reached if both need the same cores.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from shared import circumstances
from trainings import POLICY, parsed, parser_of, rows, show, trainings

KINDS: Mapping[str, Sequence[str]] = {
    "0": ["rollout.asynchronous=null"],
    "1, drain": ["rollout.asynchronous.max_off_policy_steps=1"],
    "1, keep": ["rollout.asynchronous.max_off_policy_steps=1", "rollout.asynchronous.in_flight=keep"],
}
WARMUP_STEPS = 2
PHASES = (("total",), ("sample", "grade", "pack"), ("train",), ("sync",))

Steps = list[dict[str, Any]]


def main() -> int:
    parser = parser_of(
        "Step time with and without asynchronous sampling, side by side.", prompts=16, rollouts=8
    )
    arguments = parsed(parser, warmup=WARMUP_STEPS)
    found: dict[str, Steps] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        runs = trainings(KINDS, (), arguments, folder=Path(name), policy=POLICY, max_tokens=160)
        for kind, output in runs:
            found[kind] += rows(output / "metrics.jsonl")[WARMUP_STEPS:]
    report(found, arguments.output)
    return 0


def seconds(steps: Steps, *names: str) -> float:
    """Return the median over steps of the sum of these phases."""
    return statistics.median(sum(row["seconds"][name] for name in names) for row in steps)


def report(found: Mapping[str, Steps], output: Path | None) -> None:
    table = Table(title="seconds a step, medians")
    for heading in ("lag", "step", "waits", "trains", "samples", "pushes", "tokens/s", "steps old"):
        table.add_column(heading, justify="left" if heading == "lag" else "right")
    for kind, steps in found.items():
        values = (
            seconds(steps, "total"),
            seconds(steps, "collect"),
            seconds(steps, "train"),
            seconds(steps, "sample", "grade", "pack"),
            seconds(steps, "sync"),
        )
        table.add_row(
            kind,
            *(f"{value:.3f}" for value in values),
            f"{statistics.median(row['tokens_per_s'] for row in steps):.0f}",
            f"{statistics.fmean(row.get('staleness_mean', 0) for row in steps):.1f}",
        )
    before = found["0"]
    total, samples, trains, pushes = (seconds(before, *names) for names in PHASES)
    best = max(samples, trains) + pushes
    lines = [
        f"best {best:.3f} s, {total / best:.2f}x as fast as lag 0: the longer of sampling {samples:.3f} and training "
        f"{trains:.3f}, and the push {pushes:.3f}"
    ]
    for kind, steps in found.items():
        if kind != "0":
            now, sampling, training, _ = (seconds(steps, *names) for names in PHASES)
            lines.append(
                f"lag {kind}: {total / now:.2f}x as fast as lag 0; side by side sampling takes "
                f"{sampling / samples:.2f}x as long, training {training / trains:.2f}x"
            )
    lines.append(circumstances())
    show(table, lines, output)


if __name__ == "__main__":
    sys.exit(main())
