"""A folder that appears under its name when it is complete, and not before.

It is written beside its place under a hidden name, ``.NAME.HOST-PID-RANDOM.partial``, which belongs to one process.
That process renames it and nothing else. A lock on ``.NAME.lock`` lets one process at a time write a target. The
kernel drops the lock with the process, so a hidden folder that is there while nobody holds the lock is a dead one's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DISCARD_S = 1.0
"""How long ``discard`` tries, while threads may still make files in the folder."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_HOST = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())


@contextmanager
def appearing(target: Path, *, notify: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
    """A hidden folder that becomes ``target`` when the block succeeds, and is gone when it does not.

    All its files are on disk before it gets its name. ``notify`` is told of what killed processes left behind, which
    is removed first.

    Raises:
        ValueError: something of this name is there, at the beginning or at the end, or another process is writing it.
    """
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as alone:
        _refuse_existing(target)  # a process that held the lock may just have finished
        if alone:
            for dead in _hidden(target):
                shutil.rmtree(dead, ignore_errors=True)
                notify(f"removed {dead}: a process that was killed had left it")
        partial = target.with_name(f".{target.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.partial")
        partial.mkdir()
        try:
            yield partial
            _sync(partial)
            _rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync_folder(target.parent)


def discard(target: Path) -> None:
    """Remove what this process has begun of ``target``; for a signal handler, while threads still write.

    Files are emptied first: a thread that waits for the disk would otherwise keep the process alive until all is there.
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
    # This process holds the lock, and it ends now: the file is of no use to another one.
    if _holder(target).startswith(f"{_HOST} {os.getpid()}"):
        _lock_file(target).unlink(missing_ok=True)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise ValueError(f"{target} is already there")


def _rename(partial: Path, target: Path) -> None:
    """``rename`` would replace an empty folder, and cannot replace anything else."""
    _refuse_existing(target)
    try:
        partial.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise ValueError(f"{target} was made by another process meanwhile") from error
        raise


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Whether this process is known to be the only one that writes the target; False where files cannot be locked."""
    path = _lock_file(target)
    while True:
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process ({_holder(target) or 'unknown'}) is writing {target}: wait for it, or choose "
                    "another target"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                path.unlink(missing_ok=True)
                yield False
                return
            if not _is_at(lock.fileno(), path):  # its last holder removed it
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
    """Host and process number of who locked the target last, or nothing."""
    try:
        return _lock_file(target).read_text().strip()
    except OSError:
        return ""


def _hidden(target: Path) -> list[Path]:
    """Every process's hidden folder for this target. The marks hold no dot: ``a`` does not match those of ``a.b``."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[A-Za-z0-9_]+-\d+-[0-9a-f]{{8}}\.partial")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync_folder(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
