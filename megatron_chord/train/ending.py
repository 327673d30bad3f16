"""How a rank ends: together with the other ranks, or alone.

Ranks that end together destroy their process groups. With NCCL this waits for all work that was started on the GPU. If
a rank fails alone, the others never take part in this work, and the rank would wait without end. So it prints its
traceback before it closes anything, leaves its groups as they are, and ends without Python's own clean-up, which would
wait for the same work. The launcher, or Slurm, then ends the other ranks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.halt import ALONE, ERRORS
from megatron_chord.train.start import Refused
from megatron_chord.train.stop import Stopped

_TOGETHER = (*ERRORS, Refused, Stopped)
"""What every rank raises if one does."""


class Failed(Exception):
    """This rank has failed, maybe alone. Its traceback has been printed."""


@contextmanager
def ending(world_size: int) -> Iterator[ExitStack]:
    """A block with the whole work of this rank. At its end the stack is closed, and then the groups are left.

    Raises:
        Failed: an error that the other ranks need not have. The groups still exist. Not raised in a world of one.
    """
    with _failing(world_size), _leaving(world_size), ExitStack() as stack, _failing(world_size):
        yield stack


@contextmanager
def _failing(world_size: int) -> Iterator[None]:
    """Print the traceback of an error that the other ranks need not have, and turn it into ``Failed``."""
    try:
        yield
    except (*_TOGETHER, *ALONE, Failed):
        raise  # the command line prints it, without a traceback
    except Exception as error:
        if world_size == 1:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        raise Failed("".join(traceback.format_exception_only(error)).strip()) from error


@contextmanager
def _leaving(world_size: int) -> Iterator[None]:
    """Destroy the groups of ranks, unless this rank fails alone."""
    try:
        yield
    except BaseException as error:
        if world_size == 1 or isinstance(error, _TOGETHER):
            runtime.stop()
        raise
    runtime.stop()


def end_alone(code: int) -> int:
    """End this process now if its groups of ranks still exist. Otherwise return ``code``, for a normal end."""
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code
