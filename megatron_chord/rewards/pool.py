"""Grading in processes that can be killed.

Graders run libraries that loop, exhaust memory or crash on hostile text. Each worker is a process of its own,
reached over a socket; time is kept here, and a worker that is late is killed and replaced. A grading that failed
has no score: it is never a wrong answer.

Every worker belongs to one thread of the pool, for two reasons: gradings run side by side, and the kernel's
parent-death signal means the death of the *thread* that started the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_chord.process_table import state_of
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import to_json

_START_TIMEOUT_S = 60.0
_KILL_TIMEOUT_S = 5.0
_ATTEMPTS = 2  # a worker may be killed by something that is not its text: the kernel, an operator
_MAX_REPLY_BYTES = 1 << 16
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX")


@dataclass(frozen=True)
class Grade:
    """One response's score, or why there is none."""

    score: float | None
    error: str | None = None


def longest_grading_s(timeout_s: float) -> float:
    """Of one grading with ``timeout_s``, its attempts and the starts of fresh workers included."""
    return _ATTEMPTS * (_START_TIMEOUT_S + timeout_s + _KILL_TIMEOUT_S)


class GraderPool:
    """Worker processes that grade with one kind of reward. Use it as a context manager.

    Args:
        reward: the kind with its settings; `memory_mb` includes some 100 that are taken by libraries.
        on_grade: called after each grading, from another thread.

    Raises:
        RuntimeError: a worker does not start, with the reason it printed.
    """

    def __init__(self, reward: RewardKind, *, on_grade: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = reward.timeout_s
        self._on_grade = on_grade
        self._arguments = ["--settings", json.dumps(to_json(reward))]
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._one_batch = threading.Lock()
        self._lock = threading.Lock()  # of the two below
        self._closed = False
        self._running: set[_Worker] = set()
        started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(started,), name=f"grader-{index}", daemon=True)
            for index in range(reward.workers)
        ]
        for thread in self._threads:
            thread.start()
        failures = [failure for _ in self._threads if (failure := started.get(timeout=2 * _START_TIMEOUT_S))]
        if failures:
            self.close()
            raise RuntimeError(f"a grader process did not start: {failures[0]}")

    def grade_all(self, responses: Sequence[Response]) -> list[Grade]:
        """Grades of responses, in their order. From any thread; calls wait for each other.

        Raises:
            RuntimeError: the pool is closed.
        """
        with self._one_batch:
            batch = _Batch(len(responses))
            for index, response in enumerate(responses):
                self._jobs.put(_Job(batch, index, response))
            try:
                self._wait(batch)
            finally:
                batch.cancelled = True  # a signal's exception must not leave work behind
        return [grade for grade in batch.grades if grade is not None]

    def close(self) -> None:
        """Kill the workers; a grade_all under way raises. May be called twice."""
        with self._lock:
            self._closed = True
            for worker in self._running:
                worker.process.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_START_TIMEOUT_S)

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def worker_pids(self) -> list[int]:
        with self._lock:
            return [worker.process.pid for worker in self._running]

    def _wait(self, batch: _Batch) -> None:
        limit_s = longest_grading_s(self._timeout_s)
        missing, deadline = batch.missing, time.monotonic() + limit_s
        while batch.missing and not self._closed:
            if batch.missing < missing:
                missing, deadline = batch.missing, time.monotonic() + limit_s
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{missing} of {len(batch.grades)} gradings are open, and for {limit_s:g} s none was finished"
                )
            batch.finished.wait(1.0)
        if batch.missing:
            raise RuntimeError("the grader pool is closed")

    def _serve(self, started: queue.SimpleQueue[Exception | None]) -> None:
        worker: _Worker | None = None
        try:
            worker = self._start()
        except (_WorkerLostError, OSError) as error:
            started.put(error)
            return
        started.put(None)
        while (job := self._jobs.get()) is not None:
            if job.batch.cancelled or self._closed:
                continue
            worker, grade = self._grade(worker, job)
            job.batch.put(job.index, grade)
            self._on_grade()
        self._stop(worker)

    def _grade(self, worker: _Worker | None, job: _Job) -> tuple[_Worker | None, Grade]:
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                worker = worker or self._start()
                return worker, worker.grade(job.response, self._timeout_s)
            except TimeoutError:
                stopped = worker is not None and state_of(worker.process.pid) == "T"
                self._stop(worker)
                worker, reason = None, f"killed after {self._timeout_s:g} s"
                if not stopped:  # by somebody, not by its text
                    break
            except (_WorkerLostError, OSError) as error:
                self._stop(worker)
                worker, reason = None, str(error)
        return None, Grade(None, reason)

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise _WorkerLostError("the grader pool is closed")
            worker = _Worker(self._arguments)
            self._running.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._stop(worker)
            raise
        return worker

    def _stop(self, worker: _Worker | None) -> None:
        if worker is None:
            return
        with self._lock:
            self._running.discard(worker)
        worker.kill()


class _WorkerLostError(Exception):
    """The process is gone, or does not speak as it should."""


class _Batch:
    def __init__(self, size: int) -> None:
        self.grades: list[Grade | None] = [None] * size
        self.missing = size
        self.cancelled = False
        self.finished = threading.Event()
        self._lock = threading.Lock()

    def put(self, index: int, grade: Grade) -> None:
        with self._lock:
            self.grades[index] = grade
            self.missing -= 1
        if not self.missing:
            self.finished.set()


@dataclass(frozen=True)
class _Job:
    batch: _Batch
    index: int
    response: Response


class _Worker:
    """A process and our end of its socket."""

    def __init__(self, arguments: list[str]) -> None:
        self._connection, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (kill() closes it)
        command = [sys.executable, "-P", "-B", "-m", "megatron_chord.rewards.worker"]
        command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid()), *arguments]
        # No key of the run's environment comes near a grader; equal hashes make it repeatable.
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment |= {"PYTHONPATH": str(_PACKAGE_ROOT), "PYTHONHASHSEED": "0"}
        with theirs:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which decides what becomes of its graders
            )

    def wait_until_ready(self) -> None:
        try:
            self._receive(time.monotonic() + _START_TIMEOUT_S)
        except TimeoutError:
            raise _WorkerLostError(f"no sign of life after {_START_TIMEOUT_S:g} s") from None

    def grade(self, response: Response, timeout_s: float) -> Grade:
        """Raises TimeoutError when late, _WorkerLostError when the process died."""
        deadline = time.monotonic() + timeout_s
        self._connection.settimeout(timeout_s)
        request = json.dumps(dataclasses.asdict(response), default=str).encode() + b"\n"
        try:
            self._connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            raise self._lost() from None
        reply = self._receive(deadline)
        score, error = reply.get("score"), reply.get("error")
        if isinstance(score, float) and math.isfinite(score):
            return Grade(score)
        return Grade(None, str(error))

    def kill(self) -> None:
        self.process.kill()
        # Killed but stuck in the kernel, it will be gone with its last system call.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_TIMEOUT_S)
        self._connection.close()
        self._stderr.close()

    def _receive(self, deadline: float) -> dict:
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._connection.settimeout(remaining)
            try:
                part = self._connection.recv(4096)
            except ConnectionResetError:
                part = b""
            if not part or len(line) > _MAX_REPLY_BYTES:
                raise self._lost()
            line += part
        try:
            return json.loads(line)
        except ValueError:
            raise self._lost() from None

    def _lost(self) -> _WorkerLostError:
        try:
            status = f"exit status {self.process.wait(_KILL_TIMEOUT_S)}"
        except subprocess.TimeoutExpired:
            status = "still running, its connection closed"
        self._stderr.seek(0)
        printed = self._stderr.read().decode(errors="replace").strip()[-500:]
        return _WorkerLostError(f"the grader process died ({status}){': ' + printed if printed else ''}")
