"""Writes of files: over an old one, to the disk, or all at once; and locks, which some file systems do not have."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""What a file system without locks answers: NFS without its lock daemon, Lustre mounted without flock, and NFS for a
descriptor that cannot be written (EBADF)."""


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


def write_whole(path: Path, text: str) -> None:
    """Replace a text file. A reader finds the old text or all of the new one.

    Only one process may write ``path`` at a time. It writes a hidden file beside it and renames that. The text need not
    be on the disk when this returns.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_text(text, encoding="utf-8")
        hidden.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            hidden.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Wait until a written file is on the disk, or the names of the files in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_if_possible(descriptor: int, *, waits: bool = False) -> bool:
    """Lock an open file or folder, until all copies of the descriptor are closed. Returns false if the file system has
    no locks; then two processes may believe that they are alone.

    Raises:
        BlockingIOError: another process has the lock. Not with ``waits``.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
