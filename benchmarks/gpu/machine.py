"""The description of the machine in a run's rows. As a program this module prints it as JSON: the driver runs it in a
process of its own, because a broken CUDA installation may hang or abort."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = (
    "torch",
    "triton",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "liger-kernel",
    "trl",
)
TIMEOUT_S = 180


@dataclass(frozen=True, kw_only=True)
class Machine:
    gpu: str
    """The name that the driver gives the GPU. Without a GPU: the processor and its cores."""
    has_cuda: bool
    capability: tuple[int, ...]
    cuda: str
    """The CUDA version that torch was built for. It is empty for a CPU build."""
    has_transformer_engine: bool
    versions: dict[str, str]
    commit: str
    """The commit, with -dirty if tracked files differ from it. It is unknown if the tree came without git."""

    def lacks(self, needs: tuple[str, ...]) -> list[str]:
        present = {
            "a CUDA device": self.has_cuda,
            "a GPU of capability 9.0": self.capability >= (9, 0),
            "Transformer Engine": self.has_transformer_engine,
        }
        return [need for need in needs if not present[need]]


def ask() -> Machine:
    """Describe this machine.

    Raises:
        RuntimeError: torch cannot be imported, or CUDA does not answer.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.machine"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"torch did not answer within {TIMEOUT_S} s: a device or the driver hangs"
        ) from error
    if done.returncode:
        raise RuntimeError(f"torch cannot be asked about its devices:\n{done.stderr.strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Machine(**found | {"capability": tuple(found["capability"])})


def _look() -> Machine:
    import torch

    has_cuda = torch.cuda.is_available()
    processor = f"CPU, {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return Machine(
        gpu=torch.cuda.get_device_name() if has_cuda else processor,
        has_cuda=has_cuda,
        capability=torch.cuda.get_device_capability() if has_cuda else (),
        cuda=torch.version.cuda or "",
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        versions={"python": platform.python_version()} | _versions(),
        commit=_commit(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    print(json.dumps(asdict(_look())))
