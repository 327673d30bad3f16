"""Compare a run with each tracker with the same run without one: equal numbers, and the time of a step.

    pip install '.[wandb,swanlab,trackio]' mlflow
    python benchmarks/tracking.py [--steps 12] [--repeats 2] [--threads 1] [--trackers wandb mlflow ...] [--output FILE]

The runs use the quick start's policy and problems, and one vLLM server whose answers do not depend on other requests.
They are without a tracker, with each one, and with all of them, in turn and ``--repeats`` times. MLflow writes to a
real ``mlflow server`` on this machine, wandb and SwanLab are offline, Trackio writes its local database. Step i of a
run is compared with step i of the run without a tracker of the same repeat, which does the same work. ``step`` is the
median of these ratios, ``run`` the ratio of whole runs, from the start of the trackers until they have ended. The exit
code is 1 if a run's numbers differ from those of the run without a tracker, or if a tracker failed.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table
from shared import circumstances
from trainings import POLICY, parsed, parser_of, rows, show, trainings

from megatron_chord.network import held_port
from megatron_chord.processes import die_with_parent

TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
WARMUP_STEPS = 2
TIMED = ("seconds", "tokens_per_s", "tflops_per_gpu", "mfu")
"""The metrics that may differ between two runs that compute the same."""
MLFLOW_START_S = 120

Steps = list[dict[str, Any]]


def main() -> int:
    parser = parser_of("Runs with and without trackers, side by side.", prompts=16, rollouts=8)
    parser.add_argument("--trackers", nargs="+", choices=TRACKERS, default=TRACKERS)
    arguments = parsed(parser, warmup=WARMUP_STEPS)
    kinds = {"none": "tracking=[]"} | {name: f"tracking=[{name}]" for name in arguments.trackers}
    if len(arguments.trackers) > 1:
        kinds["all"] = f"tracking=[{','.join(arguments.trackers)}]"
    found: dict[str, list[tuple[Steps, float]]] = {kind: [] for kind in kinds}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name, _offline(Path(name), arguments.trackers):
        settings = {kind: [setting] for kind, setting in kinds.items()}
        options = {"policy": POLICY, "max_tokens": 160, "repeatable": True}
        for kind, output in trainings(settings, (), arguments, folder=Path(name), **options):
            log = output.with_suffix(".log")
            took = log.stat().st_mtime - (output / "config.yaml").stat().st_mtime
            found[kind].append((rows(output / "metrics.jsonl"), took))
            said = log.read_text().splitlines()
            failures += [f"{kind}: {line}" for line in said if line.startswith("tracking: ")]
    failures += [
        f"{kind}: other numbers than without a tracker"
        for kind, runs in found.items()
        if any(_numbers(steps) != _numbers(found["none"][0][0]) for steps, _ in runs)
    ]
    report(found, failures, arguments)
    return int(bool(failures))


@contextmanager
def _offline(folder: Path, trackers: Sequence[str]) -> Iterator[None]:
    """The environment in which no tracker needs a network."""
    os.environ |= {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    if "mlflow" not in trackers:
        yield
        return
    with held_port() as port, _mlflow(folder, port) as url:
        os.environ["MLFLOW_TRACKING_URI"] = url
        yield


@contextmanager
def _mlflow(folder: Path, port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "mlflow")]
    with (folder / "mlflow.log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # else 8 processes more
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        deadline = time.monotonic() + MLFLOW_START_S
        while not _answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "mlflow.log").read_text())
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def _numbers(steps: Steps) -> Steps:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in steps]


def _seconds(steps: Steps) -> list[float]:
    return [row["seconds"]["total"] for row in steps[WARMUP_STEPS:]]


def report(found: Mapping[str, list[tuple[Steps, float]]], failures: Sequence[str], arguments: Any) -> None:
    table = Table(title="runs with a tracker, beside the run without")
    for heading in ("tracker", "step, s", "step, ratio", "run, s", "run, ratio", "numbers"):
        table.add_column(heading, justify="left" if heading in ("tracker", "numbers") else "right")
    bare = found["none"]
    for kind, runs in found.items():
        steps = [seconds for one, _ in runs for seconds in _seconds(one)]
        ratios = [
            mine / others
            for (one, _), (other, _) in zip(runs, bare, strict=True)
            for mine, others in zip(_seconds(one), _seconds(other), strict=True)
        ]
        whole = statistics.median(seconds for _, seconds in runs)
        equal = all(_numbers(one) == _numbers(bare[0][0]) for one, _ in runs)
        table.add_row(
            kind,
            f"{statistics.median(steps):.3f}",
            f"{statistics.median(ratios):.3f}",
            f"{whole:.1f}",
            f"{whole / statistics.median(seconds for _, seconds in bare):.3f}",
            "equal" if equal else "DIFFER",
        )
    lines = list(failures)
    if len(bare) > 1:
        first, second = (statistics.median(_seconds(steps)) for steps, _ in bare[:2])
        lines.append(f"without a tracker, second run beside the first: step {second / first:.3f}")
    numbers = sum(len(list(row)) for row in _numbers(bare[0][0]))
    lines.append(f"{numbers} numbers of {len(bare[0][0])} steps are compared exactly")
    lines.append(circumstances(*(name for name in arguments.trackers if name != "tensorboard")))
    show(table, lines, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
