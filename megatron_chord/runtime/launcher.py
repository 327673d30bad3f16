"""Starts the ranks of one machine, forwards signals to them, and ends them together.

    python -m megatron_chord.runtime.launcher RANKS ARGUMENT ...     (arguments of this Python)

It replaces torchrun for three reasons: torchrun's store listens on all addresses, it turns every exit code into 1, and
SIGUSR1 ends it. Here the ranks connect on loopback, to a socket that rank 0 inherits. The exit code is that of the
first rank that failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_chord.network import listener, loopback
from megatron_chord.process_table import state_of
from megatron_chord.processes import die_with_parent

RANK_OF_LAUNCHER = "MEGATRON_CHORD_RANK_OF_LAUNCHER"
"""Environment variable with the launcher's process id. A launcher of this package sets it for its ranks."""
LISTENER_VARIABLE = "MEGATRON_CHORD_LISTENER"
"""Environment variable of rank 0: the file descriptor of a socket that already listens on MASTER_ADDR and
MASTER_PORT."""
_SUCCESS_CODES = (0, 75, 76)
"""Exit codes without a fault: all steps are done, or the run was stopped on request (``train.stop``)."""
_POLL_S = 0.05
_OWN_END_S = 3.0
"""Seconds between the failure of a rank and SIGTERM. In this time other ranks may end with their own messages."""
_GRACE_S = 40.0
"""Seconds between SIGTERM and SIGKILL. Rank 0 may need 20 s to stop its server."""


def end_with_launcher() -> None:
    """Have the kernel kill this process, a rank, when the launcher that started it ends for any reason."""
    if RANK_OF_LAUNCHER in os.environ:
        die_with_parent(int(os.environ[RANK_OF_LAUNCHER]))


class Launcher:
    def __init__(self, ranks: int, command: Sequence[str]) -> None:
        """Start the ranks. Main thread only: it handles SIGINT, SIGTERM, SIGHUP and SIGUSR1 and forwards them."""
        self._failure: tuple[int, int] | None = None
        """The first rank that failed, and its ``Popen.returncode``."""
        self._terminate_at: float | None = None
        self._kill_at: float | None = None
        self._is_interrupted = False
        self._ranks: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._forward_signal)
        with listener(loopback(), 0) as meeting_point:
            for rank in range(ranks):
                self._ranks.append(_start(command, rank, ranks, meeting_point))

    def run(self) -> int:
        """Wait for the end of all ranks; returns the exit code."""
        try:
            while any(rank.poll() is None for rank in self._ranks):
                self._look_for_failure()
                self._kill_late_ranks()
                time.sleep(_POLL_S)
            self._look_for_failure()
        finally:
            self._signal(signal.SIGKILL)
        if self._failure is None:
            return max(rank.returncode for rank in self._ranks)
        code = self._failure[1]
        return code if code >= 0 else 128 - code

    def _look_for_failure(self) -> None:
        if self._failure is not None:
            return
        for number, rank in enumerate(self._ranks):
            code = rank.poll()
            if code is not None and code not in _SUCCESS_CODES:
                self._failure = number, code
                self._terminate_at = self._terminate_at or time.monotonic() + _OWN_END_S
                if code < 0 and self._kill_at is None:
                    print(f"error: rank {number} was killed by {signal.Signals(-code).name}", file=sys.stderr)
                return

    def _kill_late_ranks(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None:
            stopped = all(rank.poll() is not None or state_of(rank.pid) == "T" for rank in self._ranks)
            if now > self._kill_at or stopped:
                self._signal(signal.SIGKILL)
        elif self._terminate_at is not None and now > self._terminate_at:
            self._signal(signal.SIGTERM)
            self._kill_at = now + _GRACE_S

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal(number)
        # The first Ctrl-C may only request a stop with a checkpoint, and the ranks need time for that.
        may_go_on = number == signal.SIGUSR1 or (number == signal.SIGINT and not self._is_interrupted)
        self._is_interrupted |= number == signal.SIGINT
        if not may_go_on:
            self._kill_at = self._kill_at or time.monotonic() + _GRACE_S

    def _signal(self, number: int) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, number) if number == signal.SIGKILL else os.kill(rank.pid, number)


def _start(
    command: Sequence[str], rank: int, ranks: int, meeting_point: socket.socket
) -> subprocess.Popen[bytes]:
    place = {
        RANK_OF_LAUNCHER: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": meeting_point.getsockname()[0],
        "MASTER_PORT": str(meeting_point.getsockname()[1]),
    }
    inherited: list[int] = []
    if rank == 0:
        inherited.append(meeting_point.fileno())
        place[LISTENER_VARIABLE] = str(meeting_point.fileno())
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | place,
        pass_fds=inherited,
        start_new_session=True,  # so that a rank gets Ctrl-C only once, from this launcher
    )


if __name__ == "__main__":
    sys.exit(Launcher(int(sys.argv[1]), sys.argv[2:]).run())
