"""What a SIGTERM from Slurm means to the program of a node.

SIGTERM comes from a preemption, from ``scancel``, or from srun after a failure on another node. Without a failure and
without the batch script's file ``cancelled`` it is a preemption. A second SIGTERM, the file or a failure ends the node
at once.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Literal

from megatron_chord.cluster.outcome import has_failure

CANCELLED_FILE = "cancelled"
PREEMPTED_FILE = "preempted"
_CANCEL_S = 0.3
"""Seconds after SIGTERM in which the batch script may still write the file ``cancelled``."""


class Sigterms:
    """The SIGTERMs that this process has received. ``listen`` must be called first, in the main thread."""

    def __init__(self, folder: Path) -> None:
        """``folder``: the job's."""
        self._folder = folder
        self._count = 0
        self._first_at = 0.0

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._first_at = self._first_at or time.monotonic()

    def __bool__(self) -> bool:
        return self._count > 0

    def meaning(self) -> Literal["end", "preemption", "not known yet"]:
        """Return whether the received SIGTERM means an immediate end or a preemption.

        If the result is "not known yet", call this function again later.
        """
        if self._count > 1 or (self._folder / CANCELLED_FILE).exists() or has_failure(self._folder):
            return "end"
        return "preemption" if time.monotonic() - self._first_at >= _CANCEL_S else "not known yet"
