"""The training ranks of one node: child processes, each with a log, that are watched and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megatron_chord.cluster.job import Job
from megatron_chord.cluster.outcome import reserve
from megatron_chord.runtime.launcher import LISTENER_VARIABLE

_LOG_GRACE_S = 1.0


class Rank:
    """One rank and its process group."""

    def __init__(
        self, number: int, process: subprocess.Popen[bytes], log: Path, copier: threading.Thread | None
    ) -> None:
        self.number = number
        self.log = log
        self._process = process
        self._copier = copier

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """``Popen.returncode``; None while it runs."""
        return self._process.poll()

    def complete_log(self) -> None:
        """Wait a moment, after the rank has ended, until its last lines are in the log."""
        if self._copier is not None:
            self._copier.join(_LOG_GRACE_S)

    def terminate(self) -> None:
        """Send the rank SIGHUP, which ends it. It ignores SIGTERM, because Slurm sends SIGTERM to every process of a
        job that it preempts."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGHUP)

    def end(self, deadline: float) -> None:
        """Wait until ``deadline`` (time.monotonic()), then kill the remaining processes of its process group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def start_ranks(
    job: Job,
    command: Sequence[str],
    *,
    name: str,
    environment: dict[str, str],
    meeting_point: socket.socket | None,
) -> list[Rank]:
    """Start ``command`` as each of this node's ranks, with RANK, WORLD_SIZE and so on in its environment.

    Args:
        command: arguments of this Python, as in ``["-m", "package.module"]``.
        name: prefix of the logs: ``logs/NAME-NODE-rankN.log`` in the job's folder. The output of the first rank is also
            copied to our output.
        meeting_point: on the first node a socket that listens on the job's port (``cluster.ports``). Rank 0 inherits
            it, because it imports for seconds before it could listen. Other nodes have none.
    """
    numbers = range(job.first_rank, job.first_rank + job.ranks_per_node)
    reserve(
        job.folder,
        failures_of=[f"rank{number}" for number in numbers],
        on_first_node=meeting_point is not None,
    )
    common = os.environ | environment
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // job.ranks_per_node)))
    return [
        _start(job, local, [sys.executable, *command], name, common, meeting_point)
        for local in range(job.ranks_per_node)
    ]


def _start(
    job: Job,
    local: int,
    command: Sequence[str],
    name: str,
    common: dict[str, str],
    meeting_point: socket.socket | None,
) -> Rank:
    number = job.first_rank + local
    log = log_folder(job) / f"{name}-{job.name}-rank{number}.log"
    place = {
        "RANK": str(number),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.ranks_per_node),
        "MASTER_ADDR": job.head_address(),
        "MASTER_PORT": str(job.port),
    }
    with log.open("ab") as output:
        inherited: list[int] = []
        if number == 0:
            assert meeting_point is not None
            inherited.append(meeting_point.fileno())
            place[LISTENER_VARIABLE] = str(meeting_point.fileno())
        process = subprocess.Popen(
            command,
            env=common | place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if number == 0 else output,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
            start_new_session=True,
        )
    copier = None
    if process.stdout is not None:
        copier = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
        copier.start()
    return Rank(number, process, log, copier)


def log_folder(job: Job) -> Path:
    folder = job.folder / "logs"
    folder.mkdir(exist_ok=True)
    return folder


def _copy(source: IO[bytes], log: Path) -> None:
    """Copy every line to the log and to our own output, which is the job's output.

    If one of them cannot be written, the rank must not notice it: a pipe that nobody reads would end the rank.
    """
    is_complete = True
    with source, log.open("ab", buffering=0) as file:
        for line in source:
            lines = [line]
            try:
                file.write(line)
            except OSError as error:
                if is_complete:
                    lines.append(f"{log} lacks lines: {error.strerror}\n".encode())
                is_complete = False
            with contextlib.suppress(OSError):
                sys.stdout.buffer.writelines(lines)
                sys.stdout.buffer.flush()
