"""Writes that survive a crash of the machine, or a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def overwrite(path: Path, content: bytes) -> None:
    """Write ``content`` over the first bytes of a file. A longer file keeps its other bytes; a missing one is made.

    The file is not truncated. So if it is long enough, a disk that is full does not matter on most file systems.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Wait until a written file is on the disk, or the names of the files in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
