"""Run a function in several real processes joined by gloo, for tests of what happens across ranks.

The processes are forked from a server that has imported torch, Transformers and Megatron-Core once. A fresh interpreter
would spend two seconds of CPU time on these imports in every rank of every test.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_chord.network import held_port

ROOT = Path(__file__).resolve().parents[2]
IMPORT_VARIABLES = ("PYTHONPATH", "TRITON_INTERPRET")
"""The variables that decide which modules a process imports. A test that changes one of them gets fresh
interpreters."""
_AT_FIRST = {name: os.environ[name] for name in IMPORT_VARIABLES if name in os.environ}
"""The values of these variables before any test changed them."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 500) -> list[Any]:
    """Run ``function(*args)`` in ``world_size`` new processes. Return their results in rank order.

    The function must be a module-level one of an importable test module. Arguments and results are pickled. If a rank
    fails, the others are stopped and the tracebacks are raised in the order of the failures.
    """
    with tempfile.TemporaryDirectory() as name, held_port() as port:
        folder = Path(name)
        call = pickle.dumps((function.__module__, function.__qualname__, args))
        shared = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        processes = [
            _start(folder, call, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)
        ]
        try:
            return [_result(folder, rank, process, timeout_s) for rank, process in enumerate(processes)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid or 0, signal.SIGKILL)
                process.join()


def run_cli_forked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `megatron-chord` in one forked process, without the seconds of imports that ``task.run_cli`` takes.

    It is for commands that start no server and no ranks.
    """
    return run_ranks(_command_line, 1, arguments)[0]


def run_program_forked(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program of this repository in one forked process, which has already imported Megatron-Core."""
    return run_ranks(_program, 1, program, tuple(map(str, arguments)))[0]


def _command_line(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    from megatron_chord.cli import main

    return _captured(lambda: main(arguments), arguments)


def _program(program: Path, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    sys.argv = [str(program), *arguments]
    return _captured(lambda: runpy.run_path(str(program), run_name="__main__"), arguments)


def _captured(main: Callable[[], Any], arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Call ``main`` outside of any group of ranks. Return its exit code and what it printed."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            code = main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(arguments, code, *texts)


def _start(folder: Path, call: bytes, environment: Mapping[str, str]) -> BaseProcess:
    imports = tuple(environment.get(name) for name in IMPORT_VARIABLES)
    # The fork server adapts Megatron-Core's imports to a machine without CUDA, so it cannot serve tests on a GPU.
    can_fork = environment.get("CUDA_VISIBLE_DEVICES") == "" and imports == _served_imports()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    with mock.patch.dict(os.environ, environment, clear=True):
        process = context.Process(target=_rank, args=(folder, call, dict(environment)))
        process.start()
    return process


@functools.cache
def _served_imports() -> tuple[str | None, ...]:
    """Start the fork server with the environment as no test has changed it. Return the values of IMPORT_VARIABLES
    there."""
    environment = _AT_FIRST | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{_AT_FIRST.get('PYTHONPATH', '')}",
    }
    with mock.patch.dict(os.environ, environment):
        for name in IMPORT_VARIABLES:
            if name not in environment:
                os.environ.pop(name, None)
        multiprocessing.set_forkserver_preload(["tests.support.ranks_imports"])
        forkserver.ensure_running()
        return tuple(os.environ.get(name) for name in IMPORT_VARIABLES)


def _result(folder: Path, rank: int, process: BaseProcess, timeout_s: float) -> Any:
    process.join(timeout_s)
    output = _text(folder / f"out-{rank}", 6000)
    path = folder / f"result-{rank}.pickle"
    if not path.is_file():
        others = "".join(f"\n--- rank {p.name}\n{_text(p, 3000)}" for p in sorted(folder.glob("out-*")))
        raise RuntimeError(f"rank {rank} left no result (exit {process.exitcode}):\n{output}{others}")
    succeeded, value = pickle.loads(path.read_bytes())
    if not succeeded:
        raise RuntimeError("\n".join([*_failures(folder), output]))
    return value


def _failures(folder: Path) -> list[str]:
    """Return the tracebacks of the ranks that failed, in the order of the failures: later ones often follow from the
    first."""
    paths = sorted(folder.glob("result-*.pickle"), key=lambda path: path.stat().st_mtime_ns)
    outcomes = {path.stem.removeprefix("result-"): pickle.loads(path.read_bytes()) for path in paths}
    return [f"rank {rank} failed:\n{value}" for rank, (succeeded, value) in outcomes.items() if not succeeded]


def _text(path: Path, length: int) -> str:
    return path.read_text(errors="replace")[-length:] if path.is_file() else ""


def _rank(folder: Path, call: bytes, environment: dict[str, str]) -> None:
    """Run one rank's process. Write the function's result, or its traceback, to a file."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    # multiprocessing gives a new interpreter its parent's sys.path. That lacks what a test has put into PYTHONPATH.
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    rank = environment["RANK"]
    with (folder / f"out-{rank}").open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        module, name, args = pickle.loads(call)
        result = True, getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        result = False, traceback.format_exc()
    temporary = folder / f"tmp-{rank}"
    temporary.write_bytes(pickle.dumps(result))
    temporary.rename(folder / f"result-{rank}.pickle")
    if not result[0]:
        os._exit(1)  # the other ranks may be waiting in a collective
