"""Stop requests: a request that a run ends at the next safe point, with a checkpoint, so that it can be continued.

A stop is requested by SIGUSR1, by a first Ctrl-C (``cli``) or by a file (``FILE_VARIABLE``). A file is visible on all
nodes of a job. SIGTERM is not a stop request: it ends a run at once and without a checkpoint. In a Slurm
job the node's task decides what it means (``cluster.node``).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

FILE_VARIABLE = "CHORD_STOP_FILE"
"""Environment variable with a path. If the file exists, a stop is requested."""
EXIT_CODE = 75
"""Exit code of a run that stopped on request: EX_TEMPFAIL of sysexits.h, "try again later"."""


EXIT_CODE_IDLE = 76
"""Exit code of a run that stopped on request before it finished a single step since its start."""


class StopWanted(Exception):
    """A stop was requested during a step that can be abandoned: the continued run repeats it identically."""


class Stopped(Exception):
    """The run has stopped on request. Its state is in a checkpoint."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    def __init__(self) -> None:
        self._signalled = False
        path = os.environ.get(FILE_VARIABLE)
        self._file = Path(path) if path else None

    def listen(self) -> None:
        """Take SIGUSR1 as a stop request. Main thread only."""
        signal.signal(signal.SIGUSR1, self._on_signal)

    def is_made(self) -> bool:
        """True if a stop of this process was requested. The value never becomes false again."""
        return self._signalled or (self._file is not None and self._file.exists())

    def make(self) -> None:
        """Request a stop from within this process."""
        self._signalled = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.make()
