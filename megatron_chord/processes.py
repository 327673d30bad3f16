"""What a process leaves when it is killed: children, which die with it, and folders, which the next one removes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import tempfile
import weakref
from pathlib import Path

PREFIX = "megatron-chord."
SHARED_MEMORY = Path("/dev/shm")
_ALSO = "also-remove"
"""In a private folder: names in ``SHARED_MEMORY`` that go with it, a line each."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    The signal is sent only for a death that is yet to come, so a process that is no longer a child of ``parent`` (a
    process id) is killed here. None: any parent will do.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class PrivateFolder:
    """A new folder for this process's user alone, which this process removes.

    This process holds a lock on it that ends with it, however it ends. So whoever makes the next folder in the same
    place can tell which ones were left by killed processes, and removes these; process ids would not tell, since
    containers that share the place number their processes separately.
    """

    def __init__(self, place: Path) -> None:
        """Make a folder in ``place`` and remove what killed processes left there. OSError without room or right."""
        remove_stale(place)
        self.path, lock = _make_locked(place)
        self._remove = weakref.finalize(self, _remove, self.path, lock)  # also runs when the interpreter ends

    def also_remove(self, names: set[str]) -> None:
        """``names`` (of files in ``SHARED_MEMORY``) go with the folder when others have to remove it."""
        temporary = self.path / f"{_ALSO}.tmp"
        temporary.write_text("".join(f"{name}\n" for name in sorted(names)))
        temporary.replace(self.path / _ALSO)

    def close(self) -> None:
        """Remove the folder. May be called again."""
        self._remove()


def remove_stale(place: Path) -> None:
    """Remove the private folders in ``place`` whose processes are gone."""
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            _remove(path, lock)


def _make_locked(place: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock (closed in every program that this process starts)."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}.", dir=place))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody else gets one either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():  # nobody took it for a dead process's before it was locked
                return path, lock
            os.close(lock)


def _remove(path: Path, lock: int) -> None:
    with contextlib.suppress(OSError):
        for name in (path / _ALSO).read_text().splitlines():
            if Path(name).name == name:
                (SHARED_MEMORY / name).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
