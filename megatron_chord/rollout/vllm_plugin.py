"""vLLM plugin (entry point ``vllm.general_plugins``), which registers our weight-transfer engine.

vLLM loads it in each of its processes. If ``MEGATRON_CHORD_DIE_WITH_PARENT`` is set, each process also asks the kernel
to kill it when its parent dies, so that a killed trainer leaves no server behind. The trainer sets the variable only
for servers that it starts. On a CPU, the API server of such a server also forks its engine and inspects the model.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from multiprocessing.context import BaseContext
from pathlib import Path

from megatron_chord.processes import die_with_parent

BACKEND = "megatron_chord"
DIE_WITH_PARENT = "MEGATRON_CHORD_DIE_WITH_PARENT"
"""Environment variable with the process id of the parent. Each process sets it to its own id for its children."""
ENGINE_THREADS = "MEGATRON_CHORD_ENGINE_THREADS"
"""Environment variable: the number of OpenMP threads of each engine on a CPU. The API server itself has one."""
ROUTES_ON_CPU = "MEGATRON_CHORD_ROUTES_ON_CPU"
"""Environment variable: if it is not empty, vLLM's CPU build is adapted so that it returns routes
(``vllm_routes.py``)."""
CPU_ROUTES_VERSION = "0.32."
"""Beginning of the versions of vLLM whose CPU build ``vllm_routes.py`` can adapt."""
UPDATE_LINE = "weights updated, seconds: "
"""Beginning of the line that a worker logs after every push. JSON with the seconds of each phase follows: start, read,
check, load (vLLM's loaders), finish."""

ABANDON = {"abandon": True}
"""The body of /update_weights with which a trainer ends an update that an earlier trainer has left open. The answer is
always an error, because only a failed bucket ends vLLM's update (v1/worker/gpu_worker.py, update_weights)."""


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    parent = os.environ.get(DIE_WITH_PARENT)
    if parent and int(parent) != os.getpid():
        _end_with(int(parent))
        os.environ[DIE_WITH_PARENT] = str(os.getpid())
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _fork_engine()
            _inspect_models_here()

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_chord.rollout.vllm_engine", "WeightEngine"
        )
    if os.environ.get(ROUTES_ON_CPU):
        from megatron_chord.rollout import vllm_routes

        vllm_routes.install()


def _end_with(pid: int) -> None:
    # Imports take seconds, so the parent may have ended before this line.
    parent = multiprocessing.parent_process()
    expected = parent.pid if parent is not None else pid
    has_other_parent = multiprocessing.get_start_method(allow_none=True) == "forkserver"
    die_with_parent(None if has_other_parent else expected)


def _inspect_models_here() -> None:
    """Let this process, vLLM's API server, import the model's class itself.

    vLLM otherwise starts an interpreter for a class that it meets for the first time, so that CUDA is not initialised
    in the API server. This takes as long as the rest of the server's start.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda action: action()


def _fork_engine() -> None:
    """Let this process, vLLM's API server, fork its engine.

    On a CPU vLLM otherwise starts the engine as a new interpreter, which imports again what the API server has already
    imported. That takes about half of the server's start.
    """
    import torch
    from vllm.v1.engine import utils

    if threads := os.environ.pop(ENGINE_THREADS, None):
        # For a new interpreter. In a forked process torch has already read the variable.
        os.environ["OMP_NUM_THREADS"] = threads
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(int(threads)))

    usual_context = utils.get_mp_context

    def context() -> BaseContext:
        return multiprocessing.get_context("fork") if _can_fork() else usual_context()

    utils.get_mp_context = context
    os.register_at_fork(after_in_child=_begin_forked)


def _can_fork(at_most_s: float = 1.0) -> bool:
    """True if all other threads of this process are ZeroMQ's. A forked process cannot use, for example, OpenMP's
    threads of its parent: it would wait for them without end.

    A new thread of ZeroMQ has no name yet, so the answer "no" comes after ``at_most_s`` seconds.
    """
    deadline = time.monotonic() + at_most_s
    while not all(name.startswith("ZMQbg/") for name in _other_threads()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _other_threads() -> list[str]:
    """Names of the threads of this process, without the main thread."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            if int(task.name) != os.getpid():
                names.append((task / "comm").read_text().strip())
    return names


def _begin_forked() -> None:
    """Undo what a forked process must not share with the API server."""
    parent = os.environ[DIE_WITH_PARENT]
    os.environ[DIE_WITH_PARENT] = str(os.getpid())
    die_with_parent(int(parent))
    # Otherwise the API server's event loop would also receive this process's signals.
    signal.set_wakeup_fd(-1)
