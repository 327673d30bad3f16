"""Writes a folder atomically: it appears under its name only when it is complete.

It is first written next to its target under a hidden name, ``.NAME.HOST-PID-RANDOM.partial``, which belongs to one
process. That process renames it. A lock on ``.NAME.lock`` ensures that only one process writes a target at a time. The
kernel releases the lock when the process ends. So a hidden folder without a holder of the lock belongs to a dead
process.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_chord.files import lock_if_possible, sync_path

_DISCARD_S = 1.0
"""Seconds for which ``discard`` tries, because threads may still create files in the folder."""
_HOST = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


@contextmanager
def atomic_folder(target: Path, *, notify: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
    """A hidden folder that is renamed to ``target`` if the block succeeds and removed if it fails.

    All files are on disk (fsync) before the rename. Leftovers of killed processes are removed first, and ``notify``
    gets a message for each.

    Raises:
        ValueError: ``target`` exists, at the beginning or at the end, or another process is writing it.
    """
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as alone:
        _refuse_existing(target)  # another process may have finished just before it released the lock
        if alone:
            for dead in _hidden(target):
                shutil.rmtree(dead, ignore_errors=True)
                notify(f"removed {dead}, which a killed process had left")
        else:
            notify(f"{target.parent} has no file locks: what killed processes left there is not removed")
        partial = target.with_name(f".{target.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.partial")
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            _rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_path(target.parent)


def discard(target: Path) -> None:
    """Remove this process's unfinished ``target``. For a signal handler, while threads still write.

    Files are truncated first. Otherwise a thread that waits for the disk would keep the process alive until everything
    is written.
    """
    deadline = time.monotonic() + _DISCARD_S
    mine = f".{target.name}.{_HOST}-{os.getpid()}-"
    while time.monotonic() < deadline:
        folders = [path for path in _hidden(target) if path.name.startswith(mine)]
        if not folders:
            break
        for folder in folders:
            for file in folder.rglob("*"):
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)
            shutil.rmtree(folder, ignore_errors=True)
    # This process holds the lock and ends now, so no other process needs the lock file.
    if _holder(target).startswith(f"{_HOST} {os.getpid()}"):
        _lock_file(target).unlink(missing_ok=True)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise ValueError(f"{target} already exists")


def _rename(partial: Path, target: Path) -> None:
    """Rename without replacing anything. ``rename`` alone would replace an empty folder."""
    _refuse_existing(target)
    try:
        partial.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise ValueError(f"{target} was created by another process in the meantime") from error
        raise


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Lock the target. Yields whether the lock is held; false if the file system does not support locks."""
    path = _lock_file(target)
    while True:
        with path.open("a+") as lock:
            try:
                is_locked = lock_if_possible(lock.fileno())
            except BlockingIOError:
                raise ValueError(
                    f"another process ({_holder(target) or 'unknown'}) is writing {target}: wait for it, or choose "
                    "another target"
                ) from None
            if not is_locked:
                path.unlink(missing_ok=True)
                yield False
                return
            if not _is_at(lock.fileno(), path):  # the previous holder has removed the file
                continue
            lock.truncate(0)
            lock.write(f"{_HOST} {os.getpid()}\n")
            lock.flush()
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _holder(target: Path) -> str:
    """Host and process id of the process that locked the target last; empty if unknown."""
    try:
        return _lock_file(target).read_text().strip()
    except OSError:
        return ""


def _hidden(target: Path) -> list[Path]:
    """The hidden folders of all processes for this target. The parts have no dot, so ``a`` does not match ``a.b``."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[A-Za-z0-9_]+-\d+-[0-9a-f]{{8}}\.partial")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)
