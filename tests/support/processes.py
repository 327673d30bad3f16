"""What tests ask of other processes, beside ``megatron_chord.process_table``."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_chord.process_table import state_of


def is_alive(pid: int) -> bool:
    """Whether there is such a process that has not ended; a zombie has."""
    return state_of(pid) not in (None, "Z")


def command_line(pid: int) -> str:
    """The words of the process's command, separated by spaces; empty when there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
