"""File systems without locks."""

from __future__ import annotations

import os
from collections.abc import Callable


def refusing(answer: int) -> Callable[[int, int], None]:
    """Return a replacement of ``fcntl.flock`` that fails with this error number."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(answer, os.strerror(answer))

    return flock
