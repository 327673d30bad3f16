"""Grading in processes that can be killed.

Graders run libraries that loop, exhaust memory or crash on hostile text. Each worker is a separate process, which is
reached over a socket. The pool measures the time, and kills and replaces a worker that is late. A grading that failed
has no score; it never counts as a wrong answer.

Every worker belongs to one thread of the pool, for two reasons: gradings run at the same time, and the kernel's
parent-death signal refers to the *thread* that started the child. An ``async`` grader gets several calls at a time,
and further ones while it works on others. When its worker is lost, it is not known which call was the cause, so each
call is repeated alone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_chord.process_table import descendants, state_of
from megatron_chord.records import Grade
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import to_json
from megatron_chord.rewards.worker import MAX_STDERR_BYTES

_START_TIMEOUT_S = 60.0
_KILL_TIMEOUT_S = 5.0
_GRACE_S = 2.0  # additional time for the worker of an `async` grader, which ends late calls by itself
_LOOK_S = 0.05  # between two looks for another call, while an `async` grader has room for one
_ATTEMPTS = 2  # a worker may be killed for a reason other than its text: by the kernel or an operator
_MAX_REPLY_BYTES = 1 << 24
_CLOSED = "the grader pool is closed"
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX")


class RewardRefused(ValueError):
    """The grader of a reward cannot be loaded: the user's file, or the function in it, cannot be used."""


def longest_grading_s(timeout_s: float) -> float:
    """Longest time of one grading with ``timeout_s``, including its attempts and the starts of new workers."""
    return _ATTEMPTS * (_START_TIMEOUT_S + timeout_s + _KILL_TIMEOUT_S)


class GraderPool:
    """Worker processes that grade with one kind of reward. Use it as a context manager.

    Args:
        reward: the kind with its settings; libraries take about 100 of its `memory_mb`.
        on_grade: called after each grading, from another thread.

    Raises:
        RewardRefused: the user's file or function cannot be used.
        RuntimeError: a worker does not start, with the reason it printed.
    """

    def __init__(self, reward: RewardKind, *, on_grade: Callable[[], None] = lambda: None) -> None:
        missing = [name for name in reward.variables if name not in os.environ]
        if missing:
            raise RewardRefused(f"reward.environment: {', '.join(missing)} is not set")
        self._reward = reward
        self._on_grade = on_grade
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._last_finished = -math.inf
        self._lock = threading.Lock()  # for the two attributes below
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
            refused = [failure for failure in failures if isinstance(failure, RewardRefused)]
            raise (refused or [RuntimeError(f"a grader process did not start: {failures[0]}")])[0]

    @property
    def takes_lists(self) -> bool:
        """True if one call of the grader has several responses."""
        return self._reward.list_size is not None

    def submit(self, responses: Sequence[Response]) -> list[Future[list[Grade]]]:
        """Start to grade responses. From any thread, also while others are being graded; calls begin in their order.

        Returns:
            One future for each call of the grader, in the order of the responses. ``wait`` reads them. Cancelling one
            has an effect only before its call begins.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError(_CLOSED)
        size = 1
        if self._reward.list_size is not None:  # no more threads than are needed to keep every worker busy
            size = max(1, min(self._reward.list_size, math.ceil(len(responses) / self._reward.workers)))
        calls = [_Call(responses[start : start + size]) for start in range(0, len(responses), size)]
        for call in calls:
            self._calls.put(call)
        return [call.grades for call in calls]

    def wait(
        self, submitted: Sequence[Future[list[Grade]]], *, check: Callable[[], None] = lambda: None
    ) -> list[Grade]:
        """The grades of submitted responses, in their order.

        ``check`` is called in this thread before every wait, and about every second of it. Its exception ends the wait.

        Raises:
            RuntimeError: the pool is closed.
            TimeoutError: the pool finished no grading for ``longest_grading_s``.
            Exception: that of ``check``.
        """
        limit_s, start = longest_grading_s(self._reward.timeout_s), time.monotonic()
        found: list[Grade] = []
        for number, future in enumerate(submitted):
            while True:
                if not future.done():
                    check()
                try:
                    found += future.result(timeout=1.0)
                    break
                except TimeoutError:
                    if self._closed:
                        raise RuntimeError(_CLOSED) from None
                    if time.monotonic() - max(start, self._last_finished) > limit_s:
                        raise TimeoutError(
                            f"{len(submitted) - number} of {len(submitted)} calls of the grader are open, and none was "
                            f"finished for {limit_s:g} s"
                        ) from None
        if self._closed:  # its workers were killed, which fails their gradings
            raise RuntimeError(_CLOSED)
        return found

    def grade_all(self, responses: Sequence[Response]) -> list[Grade]:
        """Grades of responses, in their order. From any thread.

        Raises: as ``submit`` and ``wait``.
        """
        submitted = self.submit(responses)
        try:
            return self.wait(submitted)
        finally:
            for future in submitted:  # an exception from a signal handler must not leave unfinished work
                future.cancel()

    def close(self) -> None:
        """Kill the workers. Running calls of ``wait`` and ``grade_all`` raise. May be called twice."""
        with self._lock:
            self._closed = True
            for worker in self._running:
                worker.kill_group()
        for _ in self._threads:
            self._calls.put(None)
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

    def _serve(self, started: queue.SimpleQueue[Exception | None]) -> None:
        worker_queue = _WorkerQueue(self._reward.timeout_s, self._start, self._stop, self._finish)
        try:
            worker_queue.start()
        except (RewardRefused, _WorkerLostError, OSError) as error:
            started.put(error)
            return
        started.put(None)
        going_on = True
        while going_on:
            while going_on and worker_queue.has_room:
                try:
                    call = self._calls.get(block=worker_queue.is_idle)
                except queue.Empty:
                    break
                going_on = call is not None
                if call is not None and not self._closed and call.grades.set_running_or_notify_cancel():
                    worker_queue.take(call)
            worker_queue.step(_LOOK_S if going_on and worker_queue.has_room else math.inf)
        worker_queue.stop()

    def _finish(self, call: _Call, grades: list[Grade]) -> None:
        self._last_finished = time.monotonic()
        call.grades.set_result(grades)
        for _ in grades:
            self._on_grade()

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise _WorkerLostError(_CLOSED)
            worker = _Worker(self._reward)
            self._running.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._stop(worker)
            raise
        return worker

    def _stop(self, worker: _Worker) -> None:
        with self._lock:
            self._running.discard(worker)
        worker.kill()


class _WorkerQueue:
    """One thread's worker and the calls that it has not answered yet."""

    def __init__(
        self,
        timeout_s: float,
        start: Callable[[], _Worker],
        stop: Callable[[_Worker], None],
        finish: Callable[[_Call, list[Grade]], None],
    ) -> None:
        self._timeout_s = timeout_s
        self._start = start
        self._stop = stop
        self._finish = finish
        self._worker: _Worker | None = None
        self._calls_at_once = 1
        self._number = 0
        self._open: dict[int, _Call] = {}
        self._deadlines: dict[int, float] = {}
        self._again: collections.deque[_Call] = collections.deque()
        """Calls that were lost with a worker; each one is repeated alone."""

    @property
    def has_room(self) -> bool:
        """True if the worker can take another call."""
        is_repeating = bool(self._again) or any(call.attempts for call in self._open.values())
        return not is_repeating and len(self._open) < self._calls_at_once

    @property
    def is_idle(self) -> bool:
        """True if the worker has no calls."""
        return not self._open and not self._again

    def start(self) -> None:
        """Start a worker. Raises RewardRefused, _WorkerLostError or OSError."""
        self._worker = self._start()
        self._calls_at_once = self._worker.calls_at_once

    def stop(self) -> None:
        if self._worker is not None:
            self._stop(self._worker)
            self._worker = None

    def take(self, call: _Call) -> None:
        """Send ``call`` to the worker."""
        number = self._number = self._number + 1
        self._open[number] = call
        self._deadlines[number] = math.inf
        try:
            if self._worker is None:
                self.start()
            assert self._worker is not None
            grace_s = _GRACE_S if self._worker.ends_late_calls else 0.0
            self._deadlines[number] = time.monotonic() + self._timeout_s + grace_s
            self._worker.send(number, call.responses, self._timeout_s + grace_s)
        except TimeoutError:
            self._late()
        except (RewardRefused, _WorkerLostError, OSError) as error:
            self._lost(str(error))

    def step(self, timeout_s: float) -> None:
        """Wait for one answer, or for a deadline; ``timeout_s`` at most."""
        if not self._open and self._again:
            self.take(self._again.popleft())
        if not self._open:
            return
        assert self._worker is not None
        deadline, now = min(self._deadlines.values()), time.monotonic()
        try:
            number, grades = self._worker.receive_grades(min(deadline, now + timeout_s))
            self._close(number, grades)
        except TimeoutError:
            if deadline <= now + timeout_s:
                self._late()
        except (_WorkerLostError, OSError) as error:
            self._lost(str(error))

    def _late(self) -> None:
        # The text may not be the cause: the process may have been stopped, or another call may block it.
        is_unclear = len(self._open) > 1 or (
            self._worker is not None and state_of(self._worker.process.pid) == "T"
        )
        now = time.monotonic()
        self.stop()
        reason = f"killed after {self._timeout_s:g} s"
        for number, call in list(self._open.items()):
            if self._deadlines[number] > now:
                self._repeat(number, call)
            elif is_unclear:
                self._fail(number, call, reason)
            else:
                self._close(number, [Grade(None, reason)] * len(call.responses))

    def _lost(self, reason: str) -> None:
        self.stop()
        for number, call in list(self._open.items()):
            self._fail(number, call, reason)

    def _fail(self, number: int, call: _Call, reason: str) -> None:
        """An attempt has failed. The call itself may not be the cause."""
        call.attempts += 1
        if call.attempts < _ATTEMPTS:
            self._repeat(number, call)
        else:
            self._close(number, [Grade(None, reason)] * len(call.responses))

    def _repeat(self, number: int, call: _Call) -> None:
        del self._open[number], self._deadlines[number]
        self._again.append(call)

    def _close(self, number: int, grades: list[Grade]) -> None:
        call = self._open.pop(number)
        del self._deadlines[number]
        self._finish(call, grades)


class _WorkerLostError(Exception):
    """The process has ended, or its answers are malformed."""


@dataclass(eq=False)
class _Call:
    """Responses that a grader gets in one call, and their grades."""

    responses: Sequence[Response]
    grades: Future[list[Grade]] = field(default_factory=Future[list[Grade]])
    attempts: int = 0
    """Number of attempts that have failed."""


class _Worker:
    """A process and our end of its socket."""

    def __init__(self, reward: RewardKind) -> None:
        self.calls_at_once = 1
        self.ends_late_calls = False
        self._has_children = "subprocess" in reward.permissions
        self._received = b""
        self._connection, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (kill() closes it)
        command = [sys.executable, "-P", "-B", "-m", "megatron_chord.rewards.worker"]
        command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        command += ["--settings", json.dumps(to_json(reward))]
        with theirs:
            self.process = subprocess.Popen(
                command,
                env=_environment(reward),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the run handles Ctrl-C and decides when its graders end
            )

    def wait_until_ready(self) -> None:
        """Raises RewardRefused if the user's function cannot be used, _WorkerLostError if there is no process."""
        try:
            reply = self._receive(time.monotonic() + _START_TIMEOUT_S)
        except TimeoutError:
            raise _WorkerLostError(f"no reply after {_START_TIMEOUT_S:g} s") from None
        if "refused" in reply:
            raise RewardRefused(reply["refused"])
        self.calls_at_once, self.ends_late_calls = reply["calls"], reply["ends_late_calls"]

    def send(self, number: int, responses: Sequence[Response], timeout_s: float) -> None:
        """Raises TimeoutError if the worker is late, _WorkerLostError if the process died."""
        self._connection.settimeout(timeout_s)
        request = {"id": number, "responses": [dataclasses.asdict(response) for response in responses]}
        try:
            self._connection.sendall(json.dumps(request, default=str).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            raise self._lost() from None

    def receive_grades(self, deadline: float) -> tuple[int, list[Grade]]:
        """The number of a call and its grades. Raises TimeoutError, or _WorkerLostError when the process died."""
        reply = self._receive(deadline)
        self._limit_stderr()
        return reply["id"], [
            Grade(result["score"], None, result["parts"])
            if "score" in result
            else Grade(None, result["error"])
            for result in reply["results"]
        ]

    def kill_group(self) -> None:
        """Kill the process and all processes that it has started. It is the leader of its own session."""
        pids = descendants(self.process.pid) if self._has_children else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        self.kill_group()
        # A killed process that hangs in the kernel ends with its last system call.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_TIMEOUT_S)
        self._connection.close()
        self._stderr.close()

    def _limit_stderr(self) -> None:
        """Empty a large stderr file, so that a grader with much output neither fills the disk nor reaches its file
        limit.

        The worker writes at the same file offset, so it continues at the beginning.
        """
        if os.fstat(self._stderr.fileno()).st_size > MAX_STDERR_BYTES:
            self._stderr.seek(0)
            self._stderr.truncate()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._connection.settimeout(remaining)
            try:
                part = self._connection.recv(1 << 16)
            except ConnectionResetError:
                part = b""
            if not part or len(self._received) > _MAX_REPLY_BYTES:
                raise self._lost()
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
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


def _environment(reward: RewardKind) -> dict[str, str]:
    """Environment of a grader: only the run's variables that it asks for. A fixed hash seed makes it repeatable."""
    kept = (*_KEPT_ENVIRONMENT, *reward.variables)
    path = [str(_PACKAGE_ROOT)]
    if reward.RUNS_USERS_CODE and "PYTHONPATH" in os.environ:
        path.append(os.environ["PYTHONPATH"])
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    return environment | {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0"}
