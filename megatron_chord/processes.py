"""Clean-up after a killed process: its children die with it, and the next process removes its folders."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import weakref
from pathlib import Path

from megatron_chord.files import lock_if_possible, write_whole

PREFIX = "megatron-chord."
SHARED_MEMORY = Path("/dev/shm")
_ALSO = "also-remove"
"""A file in a private folder. It lists files in ``SHARED_MEMORY``, one on each line, that are removed with the
folder."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    The kernel does not signal a death that has already happened. So if this process is no longer a child of ``parent``
    (a process id), it kills itself here. None: the parent is not checked.

    Raises:
        OSError: the kernel refuses.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class PrivateFolder:
    """A new folder that only this process's user can access and that this process removes.

    The process holds a lock on the folder, which the kernel releases when the process ends. So the next process that
    makes a folder in the same place can recognise and remove folders of killed processes. Process ids would not be
    sufficient, because containers that share the place number their processes separately.
    """

    def __init__(self, place: Path) -> None:
        """Make a folder in ``place`` and remove those of killed processes there. Raises OSError if that fails."""
        remove_stale(place)
        self.path, lock = _make_locked(place)
        self._remove = weakref.finalize(self, _remove, self.path, lock)  # also runs when the interpreter ends

    def also_remove(self, names: set[str]) -> None:
        """Let another process that has to remove the folder also remove these files in ``SHARED_MEMORY``."""
        write_whole(self.path / _ALSO, "".join(f"{name}\n" for name in sorted(names)))

    def close(self) -> None:
        """Remove the folder. May be called again."""
        self._remove()


def remove_stale(place: Path) -> None:
    """Remove the private folders in ``place`` whose processes are gone."""
    for path in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it belongs to another user, or no longer exists
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                is_left = lock_if_possible(lock)
            except OSError:
                is_left = False
            if is_left:
                _remove(path, lock)
            else:
                os.close(lock)


def _make_locked(place: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock (closed in every program that this process starts)."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}.", dir=place))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            lock_if_possible(
                lock, waits=True
            )  # where this is not possible, no other process removes the folder
            if path.exists():  # false if another process has removed it before it was locked
                return path, lock
            os.close(lock)


def _remove(path: Path, lock: int) -> None:
    with contextlib.suppress(OSError):
        for name in (path / _ALSO).read_text().splitlines():
            if Path(name).name == name:
                (SHARED_MEMORY / name).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
