"""Train every method of examples/methods on the quick start's task, at equal budget: what each learns and costs.

    python benchmarks/methods.py [NAME ...] [--seeds 1] [--steps 40] [--output FILE]

Each file of examples/methods (or each named one) is trained without changes, one after the other in this process, with
one vLLM server to which every run pushes its own weights. Accuracy is that of greedy answers to the 200 held-out
problems. ``tokens`` are the trained tokens with prompts, ``rollouts`` those sampled for training. Methods spend
different amounts of both in a step. With several seeds, the table has means and intervals. This task shows that each
method runs and learns, and what a step of it costs. It separates methods by how fast they learn (half-way), and hardly
by how far they get. The small world of docs/evidence.md does that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from rich.console import Console
from rich.table import Table
from shared import circumstances

from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.evaluation.metrics import bootstrap
from megatron_chord.rollout.server import ServerSettings, start_server
from megatron_chord.runtime.megatron import hide_warnings
from megatron_chord.train.loop import train
from megatron_chord.train.setup import check_run

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "methods"
SHARED = ("common", "aligned")


def main() -> int:
    hide_warnings()
    names = sorted({path.stem for path in EXAMPLES.glob("*.yaml")} - set(SHARED))
    arguments = parse(names)
    chosen = arguments.names or names
    for name in chosen:  # check all before the first trains
        try:
            check_run(run_of(name, 0, Path("unused"), "http://127.0.0.1:1", arguments.steps), world_size=1)
        except ValueError as error:
            raise SystemExit(f"{name}: {error}") from error
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(
            ROOT / "examples" / "arithmetic" / "policy",
            ServerSettings(dtype="fp32", max_model_len=160, kv_cache_bytes=256 << 20, cpu_threads=cores()),
            log=Path(folder) / "server.log",
        )
        try:
            server.wait_until_ready(300)
            os.environ["VLLM_API_KEY"] = server.api_key
            for index, name in enumerate(chosen):
                for seed in range(arguments.seeds):
                    print(f"[{index + 1}/{len(chosen)}] {name}, seed {seed}", file=sys.stderr, flush=True)
                    output = Path(folder) / f"{name}-{seed}"
                    rows.append(run_one(name, seed, output, server.url, arguments.steps))
        finally:
            server.stop()
    report(rows, arguments.output)
    return 0


def parse(names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Every method on the quick start's task, at equal budget.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"methods among {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each (default 1)")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each run (default 40)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"no such file in {EXAMPLES}: {', '.join(sorted(unknown))}")
    return arguments


def cores() -> int:
    return len(os.sched_getaffinity(0))


def run_of(name: str, seed: int, output: Path, url: str, steps: int) -> RunConfig:
    return load_config(
        EXAMPLES / f"{name}.yaml",
        [
            f"output={output}",
            f"seed={seed}",
            f"steps={steps}",
            f"evaluation.every={max(steps // 2, 1)}",
            f"rollout.servers=[{url}]",
        ],
    )


def run_one(name: str, seed: int, output: Path, url: str, steps: int) -> dict[str, Any]:
    """Train one file. Return the numbers of its row."""
    run = run_of(name, seed, output, url, steps)
    begun = time.monotonic()
    with (output.parent / f"{output.name}.log").open("w") as log, contextlib.redirect_stdout(log):
        train(run)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if "loss" in line]
    sampled = [len(path.read_text().splitlines()) for path in output.glob("samples/step-*.jsonl")]
    return {
        "name": name,
        "seed": seed,
        "accuracy": [line["evaluation"]["accuracy"] for line in lines if "evaluation" in line],
        "length": [line["evaluation"]["response_length"] for line in lines if "evaluation" in line][-1],
        "rollouts": sum(sampled),
        "tokens": round(sum(line["tokens_per_s"] * line["seconds"]["total"] for line in taken)),
        "step_s": sum(line["seconds"]["total"] for line in taken) / len(taken),
        "seconds": time.monotonic() - begun,
    }


def report(rows: Sequence[dict[str, Any]], output: Path | None) -> None:
    """Print one line for each method, with means over its seeds, sorted by the accuracy at the end."""
    seeds = len({row["seed"] for row in rows})
    many = f", means over {seeds} seeds, with the 95 % bootstrap interval" if seeds > 1 else ""
    table = Table(title=f"held-out accuracy in %, and cost{many}")
    for heading in (
        "method",
        "before",
        "half-way",
        "after",
        "answer length",
        "rollouts",
        "tokens trained",
        "s/step",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    by_name = {
        name: [row for row in rows if row["name"] == name] for name in dict.fromkeys(r["name"] for r in rows)
    }
    for name, runs in sorted(by_name.items(), key=lambda item: -mean(run["accuracy"][-1] for run in item[1])):
        accuracies = (with_interval([run["accuracy"][place] for run in runs]) for place in (0, 1, -1))
        costs = [mean(run[what] for run in runs) for what in ("length", "rollouts", "tokens", "step_s")]
        table.add_row(name, *accuracies, *map(format, costs, (".1f", ".0f", ".0f", ".2f")))
    place = circumstances()
    Console(width=140).print(table, place)
    if output is not None:
        with output.open("w") as file:
            Console(file=file, width=140).print(table, place)


def with_interval(values: Sequence[float]) -> str:
    """Return the mean in percent; with several values also its 95 % bootstrap interval."""
    found = bootstrap([values], seed=0)
    text = f"{100 * found.value:.1f}"
    return text if len(values) == 1 else f"{text} ({100 * found.low:.1f} to {100 * found.high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
