"""Jobs of slurm/*.sh on the box: submit them, watch them, disturb them, and look for what they leave."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.slurm.box import Box
from tests.support.few_rows import few_rows
from tests.support.ranks import ROOT
from tests.support.task import metrics_of

EXAMPLE = ROOT / "examples" / "arithmetic"
SCRIPT = ROOT / "slurm" / "chord_qwen7b.sh"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def write_run(folder: Path, *, mu: float = 0.3, **settings: Any) -> Path:
    """Write a run of the quick start's policy. With mu 1 it trains on demonstrations alone and needs no server."""
    config = {
        "output": str(folder / "out"),
        "steps": 8,
        "seed": 3,
        "model": {"path": str(EXAMPLE / "policy"), "dtype": "fp32"},
        "data": {
            "prompts": str(few_rows(EXAMPLE / "problems_train.jsonl", folder / "data")),
            "demonstrations": str(few_rows(EXAMPLE / "demonstrations.jsonl", folder / "data")),
            "max_prompt_tokens": 64,
            "max_response_tokens": 64,
        },
        "batch": {"prompts": 4, "rollouts": 4, "demonstrations": 4, "max_tokens_per_gpu": 512},
        "method": {"mu": {"peak": mu}},
        "rollout": {"kv_cache_bytes": 64 * 2**20},
        "reward": {"kind": "exact", "workers": 1},
        "optim": {"lr": 3e-4},
    } | settings
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Submitted:
    """One submitted job of a script. By default it has a tiny model and the CPU stack."""

    def __init__(
        self,
        box: Box,
        folder: Path,
        *arguments: str,
        nodes: int,
        script: Path = SCRIPT,
        options: Sequence[str] = (),
        **variables: str,
    ) -> None:
        self.box = box
        self.folder = folder
        environment = {
            "CHORD_HOME": str(ROOT),
            "CHORD_PYTHON": sys.executable,
            "CHORD_JOBS": str(folder / "jobs"),
            "CHORD_RUN": str(folder / "run.yaml"),
            "CHORD_RANKS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            # Not the empty one of a fresh node, with which vLLM starts a process more for each kind of model.
            "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm")),
            **variables,
        }
        options = [
            "--parsable",
            "--time=10",
            "--signal=B:USR1@60",
            f"--nodes={nodes}",
            f"--output={folder}/job.out",
            *options,
        ]
        self.id = box.run("sbatch", *options, str(script), *arguments, env=environment).stdout.strip()

    @property
    def output(self) -> str:
        path = self.folder / "job.out"
        return path.read_text() if path.is_file() else ""

    def restart(self, number: int) -> Path:
        """Return the job's folder for its restart ``number``. 0 is the first start."""
        return self.folder / "jobs" / self.id / f"restart-{number}"

    def steps_done(self) -> int:
        path = self.folder / "out" / "metrics.jsonl"
        return sum("loss" in row for row in metrics_of(self.folder / "out")) if path.is_file() else 0

    def state(self) -> str:
        return self.box.job(self.id)["JobState"]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.state() not in _ENDED, f"the job ended before its time:\n{self.output[-6000:]}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.output[-6000:]}"
            time.sleep(0.2)

    def wait(self, timeout_s: float = 240) -> tuple[str, int]:
        """Wait until the job ends. Return its state and its exit code."""
        deadline = time.monotonic() + timeout_s
        while self.state() not in _ENDED:
            assert time.monotonic() < deadline, f"the job does not end:\n{self.output[-6000:]}"
            time.sleep(0.2)
        return self.state(), int(self.box.job(self.id)["ExitCode"].partition(":")[0])

    def processes(self, *words: str) -> list[int]:
        """Return the live processes of the job, on any node, whose command line holds all the words."""
        mark = f"CHORD_JOB={self.folder}/jobs/{self.id}/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    environment = (entry / "environ").read_bytes()
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if mark in environment and all(word in command for word in words):
                        found.append(int(entry.name))
        return found

    def left_behind(self, timeout_s: float = 120) -> list[int]:
        """Return the processes that still run ``timeout_s`` after the job has ended."""
        deadline = time.monotonic() + timeout_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.processes()


def rank_process(job: Submitted, rank: int) -> int:
    """Return the process of a training rank."""
    for pid in job.processes("megatron_chord.cli", "train"):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and _is_node_task(parent_of(pid)):
                return pid
    raise AssertionError(f"no process of rank {rank}")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _is_node_task(pid: int) -> bool:
    return b"megatron_chord.cluster.node" in Path(f"/proc/{pid}/cmdline").read_bytes()
