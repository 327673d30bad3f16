"""Reads Linux's process table (proc_pid_stat(5))."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def state_of(pid: int) -> str | None:
    """R: running, S: sleeping, D: waiting in the kernel, T: stopped by a signal, Z: ended. None: no such process."""
    fields = _stat(pid)
    return fields[0] if fields else None


def descendants(root: int) -> list[int]:
    """Process ids of ``root``'s children, of their children, and so on, without processes that have ended."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) and fields[0] != "Z":
            parents[int(entry.name)] = int(fields[1])
    found: list[int] = []
    new = [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def kill_descendants() -> None:
    """Send SIGKILL to all descendants of this process."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields after the command: state, parent, group, session, ... The command may have spaces and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
