"""What tests ask of other processes, in addition to ``megatron_chord.process_table``."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_chord.process_table import state_of


def is_alive(pid: int) -> bool:
    """Return whether the process exists and has not ended. A zombie has ended."""
    return state_of(pid) not in (None, "Z")


def command_line(pid: int) -> str:
    """Return the words of the process's command, separated by spaces. Return "" if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
