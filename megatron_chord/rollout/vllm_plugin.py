"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``): our weight-transfer engine.

With ``MEGATRON_CHORD_DIE_WITH_PARENT`` set, each process also asks the kernel to be killed when its parent dies, so
that a trainer that was itself killed leaves no server behind. A server that the trainer did not start is left alone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

BACKEND = "megatron_chord"
DIE_WITH_PARENT = "MEGATRON_CHORD_DIE_WITH_PARENT"
"""Environment variable: the parent's process id, the trainer's in the server itself. Each process hands on its own."""
UPDATE_LINE = "weights updated, seconds: "
"""What comes before JSON in a worker's log after every push: start, read, check, load (vLLM's own), finish."""
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    parent = os.environ.get(DIE_WITH_PARENT)
    if parent and int(parent) != os.getpid():
        _die_with_parent(int(parent))
        os.environ[DIE_WITH_PARENT] = str(os.getpid())

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "megatron_chord.rollout.vllm_engine", "WeightEngine"
        )


def _die_with_parent(pid: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # Imports take seconds before a process gets here, and the signal is sent only for a death that is yet to come.
    parent = multiprocessing.parent_process()
    expected = parent.pid if parent is not None else pid
    if os.getppid() != expected and multiprocessing.get_start_method(allow_none=True) != "forkserver":
        os.kill(os.getpid(), signal.SIGKILL)
