"""Detects that the only rank of a job is stopped (SIGSTOP).

In a job with several ranks, the other ranks detect it (``heartbeat``).
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from megatron_chord.process_table import state_of
from megatron_chord.runtime.heartbeat import STACK_SIGNAL, read_beat


class StoppedRank:
    """Watches a rank from its parent process. The parent does not train."""

    def __init__(self, pid: int, *, rank: int, node: str, beats: Path, limit_s: float) -> None:
        """
        Args:
            beats: folder with the rank's heartbeat.
            limit_s: how long the rank may be stopped.
        """
        self._pid = pid
        self._name = f"rank {rank} on {node} (process {pid})"
        self._rank = rank
        self._beats = beats
        self._limit_s = limit_s
        self._since: float | None = None
        self._last: float | None = None

    def look(self, now: float) -> str | None:
        """Describe the fault once the rank has been stopped for longer than the limit, else None.

        ``now`` is time.monotonic(). Time in which this function was not called for long does not count: then the whole
        job was suspended, which is no fault.
        """
        slept = self._last is not None and now - self._last > self._limit_s / 2
        self._last = now
        if state_of(self._pid) != "T":
            self._since = None
            return None
        if self._since is None or slept:
            self._since = now
        if now - self._since <= self._limit_s:
            return None
        beat = read_beat(self._beats, self._rank)
        where = f". It was {beat['phase']}, at {beat['at']}" if beat is not None else ""
        stopped_s = f"{now - self._since:.0f} s (limit {self._limit_s:g} s)"
        return f"frozen: {self._name} has been stopped (SIGSTOP) for {stopped_s}{where}"

    def print_stacks(self) -> None:
        """Send the rank the signals that make it continue and print the stacks of its threads to its log."""
        # A rank without a heartbeat has no handler yet, and the signal would kill it.
        if read_beat(self._beats, self._rank) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, STACK_SIGNAL)
                os.kill(self._pid, signal.SIGCONT)
