"""Short trainings on the quick start's problems, with one vLLM server, for ``overlap``, ``tails`` and ``tracking``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_chord.rollout.server import ServerSettings, start_server

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "methods" / "common.yaml"
POLICY = ROOT / "examples" / "arithmetic" / "policy"


def parser_of(description: str, *, prompts: int, rollouts: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--rollouts", type=int, default=rollouts)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of the trainer, and of the server"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    return parser


def parsed(parser: argparse.ArgumentParser, *, warmup: int) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.steps <= warmup:
        parser.error(f"--steps must be more than the {warmup} that are left out")
    return arguments


def trainings(
    kinds: Mapping[str, Sequence[str]],
    common: Sequence[str],
    arguments: argparse.Namespace,
    *,
    folder: Path,
    policy: Path,
    max_tokens: int,
    repeatable: bool = False,
) -> Iterator[tuple[str, Path]]:
    """Train with the settings of each kind in turn, ``--repeats`` times. Yield the kind and the output folder of each
    finished run.

    Beside the folder is a file ``.log`` with what the run printed.

    Args:
        common: settings of all kinds.
        folder: for what the runs write.
        max_tokens: of a prompt and its answer together.
        repeatable: answers do not depend on the other requests of a batch, so that equal runs have equal numbers.
    """
    server = start_server(
        policy,
        ServerSettings(
            dtype="fp32",
            max_model_len=max_tokens,
            kv_cache_bytes=256 << 20,
            cpu_threads=arguments.threads,
            repeatable=repeatable,
        ),
        log=folder / "server.log",
    )
    environment = os.environ | {
        "VLLM_API_KEY": server.api_key,
        "OMP_NUM_THREADS": str(arguments.threads),
    }
    try:
        server.wait_until_ready(300)
        for repeat in range(arguments.repeats):
            for kind, settings in kinds.items():
                print(f"{kind}, {repeat + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
                output = folder / f"{kind.replace(', ', '-')}-{repeat}"
                command = [sys.executable, "-m", "megatron_chord.cli", "train", str(EXAMPLE)]
                command += [*common, *settings]
                command += [
                    f"output={output}",
                    f"model.path={policy}",
                    f"steps={arguments.steps}",
                    f"batch.prompts={arguments.prompts}",
                    f"batch.rollouts={arguments.rollouts}",
                    "data.evaluation=null",
                    "optim.warmup_steps=0",
                    f"rollout.servers=[{server.url}]",
                ]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                output.with_suffix(".log").write_text(done.stdout + done.stderr)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
                yield kind, output
    finally:
        server.stop()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(table: Table, lines: Sequence[str], output: Path | None) -> None:
    """Print to the terminal, and to a file if one is given."""

    def write(console: Console) -> None:
        console.print(table)
        for line in lines:
            console.print(line, highlight=False)

    write(Console(width=120))
    if output is not None:
        with output.open("w", encoding="utf-8") as file:
            write(Console(file=file, width=120))
