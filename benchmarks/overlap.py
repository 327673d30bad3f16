"""The time of a step when its rollouts are sampled before it trains, and while the step before trains.

    python benchmarks/overlap.py [--steps 12] [--repeats 2] [--prompts 16] [--rollouts 8] [--threads 1] [--output FILE]

The quick start's policy and problems, against one vLLM server to which every run pushes its own weights:
``rollout.lag`` 0, 1, and 1 with ``in_flight: keep``, in turn and ``--repeats`` times, each in a process of its own with
``--threads`` threads for the trainer and as many for the server. Medians over the steps of all repeats, the first two
of each run left out. ``best`` is what perfect overlap would give: the longer of sampling and training as lag 0 has
them, and the push of weights, which neither can overlap with. It cannot be had where both want the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shared import circumstances

from megatron_chord.rollout.server import ServerSettings, start_server

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "methods" / "common.yaml"
POLICY = ROOT / "examples" / "arithmetic" / "policy"
KINDS: Mapping[str, Sequence[str]] = {
    "0": ["rollout.lag=0"],
    "1, drain": ["rollout.lag=1"],
    "1, keep": ["rollout.lag=1", "rollout.in_flight=keep"],
}
WARMUP_STEPS = 2
PHASES = (("total",), ("sample", "grade", "pack"), ("train",), ("sync",))

Steps = list[dict[str, Any]]


def main() -> int:
    arguments = parse()
    found: dict[str, Steps] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(
            POLICY,
            ServerSettings(
                dtype="fp32", max_model_len=160, kv_cache_bytes=256 << 20, cpu_threads=arguments.threads
            ),
            log=Path(folder) / "server.log",
        )
        try:
            server.wait_until_ready(300)
            os.environ["VLLM_API_KEY"] = server.api_key
            os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
            for repeat in range(arguments.repeats):
                for kind in KINDS:
                    print(f"lag {kind}, {repeat + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
                    output = Path(folder) / f"{kind.replace(', ', '-')}-{repeat}"
                    found[kind] += run(KINDS[kind], output, server.url, arguments)[WARMUP_STEPS:]
        finally:
            server.stop()
    report(found, arguments.output)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step time with and without sampling ahead, side by side.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of trainer and server each")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if arguments.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than the {WARMUP_STEPS} that are left out")
    return arguments


def run(overrides: Sequence[str], output: Path, url: str, arguments: argparse.Namespace) -> Steps:
    """One training; its steps' rows."""
    command = [sys.executable, "-m", "megatron_chord.cli", "train", str(EXAMPLE), *overrides]
    command += [
        f"output={output}",
        f"steps={arguments.steps}",
        f"batch.prompts={arguments.prompts}",
        f"batch.rollouts={arguments.rollouts}",
        "data.evaluation=null",
        "optim.warmup_steps=0",
        f"rollout.servers=[{url}]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def seconds(rows: Steps, *names: str) -> float:
    """Median over steps of the sum of these phases."""
    return statistics.median(sum(row["seconds"][name] for name in names) for row in rows)


def report(found: Mapping[str, Steps], output: Path | None) -> None:
    table = Table(title="seconds a step, medians")
    for heading in ("lag", "step", "waits", "trains", "samples", "pushes", "tokens/s", "steps old"):
        table.add_column(heading, justify="left" if heading == "lag" else "right")
    for kind, rows in found.items():
        values = (
            seconds(rows, "total"),
            seconds(rows, "collect"),
            seconds(rows, "train"),
            seconds(rows, "sample", "grade", "pack"),
            seconds(rows, "sync"),
        )
        table.add_row(
            kind,
            *(f"{value:.3f}" for value in values),
            f"{statistics.median(row['tokens_per_s'] for row in rows):.0f}",
            f"{statistics.fmean(row.get('staleness_mean', 0) for row in rows):.1f}",
        )
    before = found["0"]
    total, samples, trains, pushes = (seconds(before, *names) for names in PHASES)
    best = max(samples, trains) + pushes
    lines = [
        f"best {best:.3f} s, {total / best:.2f}x as fast as lag 0: the longer of sampling {samples:.3f} and training "
        f"{trains:.3f}, and the push {pushes:.3f}"
    ]
    for kind, rows in found.items():
        if kind != "0":
            now, sampling, training, _ = (seconds(rows, *names) for names in PHASES)
            lines.append(
                f"lag {kind}: {total / now:.2f}x as fast as lag 0; side by side sampling takes "
                f"{sampling / samples:.2f}x as long, training {training / trains:.2f}x"
            )
    lines.append(circumstances())
    write(Console(width=120), table, lines)
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            write(Console(file=file, width=120), table, lines)


def write(console: Console, table: Table, lines: Sequence[str]) -> None:
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
