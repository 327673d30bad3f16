"""Rewards that run code: a program against its tests, and worked sums as assertions.

Model text is executed here. It runs in a separate process without environment variables. This process cannot write any
byte to a file, and it has limits on time, memory and processes. If the kernel allows user namespaces, the process also
has no network, and all its child processes end with it. It can still read this machine's files and create empty ones.
For code that may be hostile, run the training in a container, or put a stronger sandbox in front of PYTHON.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys

from megatron_chord.rewards.response import Response

CPU_SECONDS = 2
WALL_SECONDS = 10
MEMORY_BYTES = 512 << 20

_NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
_HAS_NAMESPACES = (
    shutil.which("unshare") is not None
    and subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False).returncode == 0
)
PYTHON = [*(_NAMESPACES if _HAS_NAMESPACES else []), sys.executable, "-I", "-"]
_PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)
_SUM = re.compile(r"([0-9]+) ?([-+*]) ?([0-9]+) ?= ?([0-9]+)")


def passes_tests(response: Response) -> float:
    """1 if the last ```python block passes the row's `tests` (Python text with assertions), else 0."""
    programs = _PROGRAM.findall(response.text)
    return float(bool(programs) and runs(f"{programs[-1]}\n{response.fields['tests']}"))


def sums_are_right(response: Response) -> float:
    """1 if the answer works something out, as in 59+8=67, and every sum in it is right; else 0."""
    sums = _SUM.findall(response.text)
    return float(bool(sums) and runs("".join(f"assert {a} {sign} {b} == {c}\n" for a, sign, b, c in sums)))


def runs(program: str) -> bool:
    """True if a program ends within the limits and without an exception."""
    try:
        done = subprocess.run(
            PYTHON,
            input=program.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            timeout=WALL_SECONDS,
            preexec_fn=_limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
