"""vLLM plugin (entry point ``vllm.general_plugins``), which registers our weight-transfer engine.

vLLM loads it in each of its processes. If ``MEGATRON_CHORD_DIE_WITH_PARENT`` is set, each process also asks the kernel
to kill it when its parent dies, so that a killed trainer leaves no server behind. The trainer sets the variable only
for servers that it starts.
"""

from __future__ import annotations

import multiprocessing
import os

from megatron_chord.processes import die_with_parent

BACKEND = "megatron_chord"
DIE_WITH_PARENT = "MEGATRON_CHORD_DIE_WITH_PARENT"
"""Environment variable with the process id of the parent. Each process sets it to its own id for its children."""
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
