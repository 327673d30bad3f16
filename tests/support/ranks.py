"""Runs a function in several real processes joined by gloo, for tests of what happens across ranks."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300) -> list[Any]:
    """``function(*args)`` in ``world_size`` fresh processes; their results in rank order.

    The function must be a module-level one of an importable test module; arguments and results are pickled. When a
    rank fails, the others are stopped and the failure is raised with the rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        call = Path(folder) / "call.pickle"
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        probe.close()
        processes = []
        for rank in range(world_size):
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.ranks", folder],
                    env=env,
                    stdout=(Path(folder) / f"out-{rank}").open("wb"),
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        try:
            return [_result(Path(folder), rank, process, timeout_s) for rank, process in enumerate(processes)]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _result(folder: Path, rank: int, process: subprocess.Popen[bytes], timeout_s: float) -> Any:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    output = (folder / f"out-{rank}").read_text(errors="replace")[-6000:]
    path = folder / f"result-{rank}.pickle"
    if not path.is_file():
        others = "".join(
            f"\n--- rank {p.name}\n{p.read_text(errors='replace')[-3000:]}"
            for p in sorted(folder.glob("out-*"))
        )
        raise RuntimeError(f"rank {rank} left no result (exit {process.returncode}):\n{output}{others}")
    succeeded, value = pickle.loads(path.read_bytes())
    if not succeeded:
        raise RuntimeError(f"rank {rank} failed:\n{value}\n{output}")
    return value


def _main(folder: Path) -> None:
    module, name, args = pickle.loads((folder / "call.pickle").read_bytes())
    try:
        result = True, getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        result = False, traceback.format_exc()
    temporary = folder / f"tmp-{os.environ['RANK']}"
    temporary.write_bytes(pickle.dumps(result))
    temporary.rename(folder / f"result-{os.environ['RANK']}.pickle")
    if not result[0]:
        os._exit(1)  # the other ranks may be waiting in a collective


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
