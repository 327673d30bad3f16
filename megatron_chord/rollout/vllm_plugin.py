"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``): our weight-transfer engine.

With ``MEGATRON_CHORD_DIE_WITH_PARENT`` set, each process also asks the kernel to be killed when its parent dies, so
that a trainer that was itself killed leaves no server behind. A server that the trainer did not start is left alone.
"""

from __future__ import annotations

import multiprocessing
import os

from megatron_chord.processes import die_with_parent

BACKEND = "megatron_chord"
DIE_WITH_PARENT = "MEGATRON_CHORD_DIE_WITH_PARENT"
"""Environment variable: the parent's process id, the trainer's in the server itself. Each process hands on its own."""
UPDATE_LINE = "weights updated, seconds: "
"""What comes before JSON in a worker's log after every push: start, read, check, load (vLLM's own), finish."""


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


def _end_with(pid: int) -> None:
    # Imports take seconds before a process gets here: its parent may be gone.
    parent = multiprocessing.parent_process()
    expected = parent.pid if parent is not None else pid
    has_other_parent = multiprocessing.get_start_method(allow_none=True) == "forkserver"
    die_with_parent(None if has_other_parent else expected)
