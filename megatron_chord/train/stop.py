"""A wish that a run end soon: at the next safe point, with a checkpoint, to be continued later.

It comes as SIGUSR1, as a first Ctrl-C (``cli``) or as a file (``FILE_VARIABLE``). A file reaches all nodes of a job,
whatever lies between its batch script and its ranks. SIGTERM is no such wish: it ends a run at once and without a
checkpoint.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

FILE_VARIABLE = "CHORD_STOP_FILE"
"""Environment variable: a path whose existence is the wish."""
EXIT_CODE = 75
"""Of a run that stopped so: EX_TEMPFAIL of sysexits.h, "try again later"."""


EXIT_CODE_IDLE = 76
"""Of a run that stopped so before it had done a single step since it was started."""


class StopWanted(Exception):
    """Raised where a step can be given up without loss: it is taken again, the same, when the run continues."""


class Stopped(Exception):
    """The run has stopped as it was asked to; what it had done is in a checkpoint."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopWish:
    def __init__(self) -> None:
        self._signalled = False
        path = os.environ.get(FILE_VARIABLE)
        self._file = Path(path) if path else None

    def listen(self) -> None:
        """Take SIGUSR1 as the wish. Main thread only."""
        signal.signal(signal.SIGUSR1, self._on_signal)

    def there(self) -> bool:
        """Whether the wish has come, to this process; it does not go away."""
        return self._signalled or (self._file is not None and self._file.exists())

    def want(self) -> None:
        """The wish has come, by another way."""
        self._signalled = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.want()
