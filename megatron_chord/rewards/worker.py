"""One grader process: `python -m megatron_chord.rewards.worker`. Only `rewards.pool` starts it.

It reads ``{"id", "responses"}`` and answers ``{"id", "results"}``, one JSON line each, over the socket that it
inherits. A result is ``{"score", "parts"}`` or ``{"error"}``. The process assumes that the text is hostile and that a
grading library may catch all exceptions. Therefore forbidden actions and exhausted resources are recorded separately,
so that neither counts as a wrong answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import numbers
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from megatron_chord.processes import die_with_parent
from megatron_chord.rewards.kinds.base import Permission, RewardKind
from megatron_chord.rewards.kinds.function import is_async
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import from_json

MAX_STDERR_BYTES = 1 << 20
"""Size of a worker's stderr file above which the pool empties it, between two answers."""
_MAX_FILE_BYTES = 16 * MAX_STDERR_BYTES
"""Size of the largest file that a worker without the permission ``files`` can write: its stderr during one call."""
_MAX_LINE_BYTES = 1 << 30
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS: dict[Permission, tuple[str, ...]] = {
    "network": ("socket.", "urllib.", "http."),
    "subprocess": (
        "subprocess.",
        "pty.",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.kill",
    ),
    "files": (
        *(
            "shutil.",
            "tempfile.",
            "os.chmod",
            "os.chown",
            "os.link",
            "os.lockf",
            "os.mkdir",
            "os.remove",
            "os.rename",
        ),
        *("os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime"),
    ),
}
"""Permission -> prefixes of the audit events that need it. Opening a file for writing is checked separately."""
_NEVER = ("os.", "ctypes.", "signal.")
"""Prefixes of further audit events, which a grader of this package never needs."""
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
_EXHAUSTION = (MemoryError, RecursionError)
_FAILURES = (Exception, SystemExit)
"""What a grader may raise. ``sys.exit`` in a library must not end the worker."""
# The only code that sympy's own parser evaluates for a number: Integer (2 ), Float ('1.5' ).
_NUMBER_CODE = re.compile(r"\s*-?\s*(?:Integer|Float|Rational)\s*\(\s*'?[0-9.eE+-]+'?\s*\)\s*")


class Watch:
    """Records the errors during one grading, even if the grader caught them."""

    def __init__(self, permissions: frozenset[Permission] = frozenset(), *, is_users: bool = False) -> None:
        """``is_users``: the grader is not part of this package. Then only actions that need a permission are
        forbidden."""
        self.exhausted = False
        self._permissions = permissions
        self._is_users = is_users
        self._open: list[list[str]] = []

    @contextlib.contextmanager
    def findings(self) -> Iterator[list[str]]:
        """The errors recorded during the block. Blocks may overlap (``async``); each then has the errors of all."""
        found: list[str] = []
        self._open.append(found)
        if not self._is_users:
            sys.settrace(self._trace_call)
        try:
            yield found
        finally:
            if not self._is_users:
                # Python removes a trace function that fails. Ours fails only when stack or memory is exhausted.
                if sys.gettrace() is None:
                    self._note("ran out of stack")
                sys.settrace(None)
            self._open = [other for other in self._open if other is not found]

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Hook for `sys.addaudithook`: no processes, no network, no written files, unless they are allowed."""
        needed = self._needed(event, args)
        if needed is not None and needed not in self._permissions:
            hint = f"; reward.allow has no {needed}" if self._is_users else ""
            self.refuse(f"tried {event}{hint}")

    def refuse(self, finding: str) -> None:
        self._note(finding)
        raise PermissionError(f"a grader {finding}")

    def _note(self, finding: str) -> None:
        for found in self._open:
            found.append(finding)

    def _needed(self, event: str, args: tuple[Any, ...]) -> str | None:
        """The permission that an event needs; None if it needs none."""
        if event == "open":
            is_new = (
                not isinstance(args[0], int) and args[0] != os.devnull
            )  # no descriptor that is open already
            return "files" if is_new and (args[2] or 0) & _WRITE_FLAGS else None
        if event == "socket.__new__" and args[1] == socket.AF_UNIX and self._is_users:
            return None  # one end of a pair: to reach anybody else it would have to connect
        for permission, beginnings in _EVENTS.items():
            if event.startswith(beginnings):
                return permission
        if event.startswith(_NEVER) and event not in _HARMLESS and not self._is_users:
            return "anything"
        return None

    def _trace_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_lines = False
        return self._trace_exception

    def _trace_exception(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception" and issubclass(arg[0], _EXHAUSTION):
            # Release the exception here: it references the frames that hold the memory.
            self._note(f"ran out of {'memory' if issubclass(arg[0], MemoryError) else 'stack'}")
            self.exhausted = self.exhausted or issubclass(arg[0], MemoryError)
        return self._trace_exception


class Grading:
    """A loaded grader, and the results of its calls."""

    def __init__(self, reward: RewardKind, grader: Callable[[Any], Any], watch: Watch) -> None:
        self._reward = reward
        self._grader = grader
        self._watch = watch

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._watch.findings() as findings:
            try:
                value = self._grader(self._argument(request))
            except _FAILURES as error:  # the error of this grading, not a crash
                return self._failed(request, error)
        return self._reply(request, value, findings)

    async def answer_async(self, request: Mapping[str, Any]) -> dict[str, Any]:
        limit_s = self._reward.timeout_s
        with self._watch.findings() as findings:
            try:
                async with asyncio.timeout(limit_s) as timeout:
                    value = await self._grader(self._argument(request))
            except _FAILURES as error:
                if timeout.expired():
                    return _all_failed(request, f"took longer than {limit_s:g} s")
                return self._failed(request, error)
        return self._reply(request, value, findings)

    def _argument(self, request: Mapping[str, Any]) -> Any:
        responses = [Response(**item) for item in request["responses"]]
        return responses if self._reward.list_size else responses[0]

    def _failed(self, request: Mapping[str, Any], error: BaseException) -> dict[str, Any]:
        self._watch.exhausted = self._watch.exhausted or isinstance(error, MemoryError)
        return _all_failed(request, self._reward.error_text(error)[:500])

    def _reply(self, request: Mapping[str, Any], value: Any, findings: Sequence[str]) -> dict[str, Any]:
        size, values = len(request["responses"]), [value]
        if self._reward.list_size:
            if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != size:
                given = f"{len(value)} of them" if isinstance(value, Sequence) else f"{value!r:.80}"
                return _all_failed(request, f"the grader must return a list of {size} results, got {given}")
            values = list(value)
        return {"id": request["id"], "results": [self._result(item, findings) for item in values]}

    def _result(self, value: Any, findings: Sequence[str]) -> dict[str, Any]:
        try:
            result = _measured(value)
        except Exception as error:  # from the value itself, such as an int that is too large for a float
            reason = f"{type(error).__name__}: {error}"[:200]
            return {
                "error": f"the grader returned a value of type {type(value).__name__} that is no number: {reason}"
            }
        # A proof of equality is valid even if something failed before it.
        if findings and (self._reward.RUNS_USERS_CODE or result.get("score") != 1.0):
            return {"error": f"the grader {findings[0]}"}
        return result


def main() -> None:
    options = _options()
    reward = from_json(json.loads(options.settings))
    _confine(options.parent, reward)
    connection = socket.socket(fileno=options.fd)
    try:
        grader = reward.load()  # only now, under the memory limit: importing is the expensive part
    except ValueError as error:
        _send(connection, {"refused": str(error)})
        return
    if reward.EXAMPLE is not None:
        grader(reward.EXAMPLE)
    watch = Watch(reward.permissions, is_users=reward.RUNS_USERS_CODE)
    if not reward.RUNS_USERS_CODE:
        _guard_sympy(watch)
    grading = Grading(reward, grader, watch)
    if is_async(grader):
        asyncio.run(_serve_async(connection, grading, watch, calls=reward.calls_at_once))
    else:
        _serve(connection, grading, watch)


def _serve(connection: socket.socket, grading: Grading, watch: Watch) -> None:
    _send(connection, {"calls": 1, "ends_late_calls": False})
    sys.addaudithook(watch.audit)
    for line in connection.makefile("rb"):
        _send(connection, grading.answer(json.loads(line)))
        if watch.exhausted:
            return  # the pool starts a fresh one


async def _serve_async(connection: socket.socket, grading: Grading, watch: Watch, *, calls: int) -> None:
    """Calls run at the same time. The pool sends at most ``calls`` at a time."""
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=_MAX_LINE_BYTES)
    writer.write(_line({"calls": calls, "ends_late_calls": True}))
    sys.addaudithook(watch.audit)
    running: set[asyncio.Task[None]] = set()

    async def serve(line: bytes) -> None:
        writer.write(_line(await grading.answer_async(json.loads(line))))

    while not watch.exhausted and (line := await reader.readline()):
        task = asyncio.create_task(serve(line))
        running.add(task)
        task.add_done_callback(running.discard)
    await writer.drain()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--settings", required=True)
    return parser.parse_args()


def _confine(parent: int, reward: RewardKind) -> None:
    die_with_parent(parent)
    # Signals meant for the run reach every process of a Slurm step; the pool decides when a worker ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "files" not in reward.permissions:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
    memory_bytes = reward.memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _guard_sympy(watch: Watch) -> None:
    """Install the guard in a grader process that has imported sympy."""
    parser = sys.modules.get("sympy.parsing.sympy_parser")
    if parser is not None:
        vars(parser)["eval_expr"] = _only_numbers(vars(parser)["eval_expr"], watch)


def _only_numbers(eval_expr: Any, watch: Watch) -> Any:
    """sympy turns every written number into code and evaluates it. Nothing else may be evaluated."""

    def checked(code: str, local_dict: Any, global_dict: Any) -> Any:
        if not _NUMBER_CODE.fullmatch(code):
            watch.refuse(f"tried to evaluate {code[:80]!r}")
        return eval_expr(code, local_dict, global_dict)

    return checked


def _measured(value: Any) -> dict[str, Any]:
    """The result for a number, or for several numbers that add up to the score; an error for anything else."""
    if isinstance(value, Mapping):
        wrong = [name for name in value if not isinstance(name, str)]
        if wrong or not value:
            return {"error": f"the grader returned {value!r:.80}, expected a mapping of names to numbers"}
        parts: dict[str, float] = {}
        for name, part in value.items():
            number = _number(part)
            if isinstance(number, str):
                return {"error": f"the grader returned {number} for `{name}`, expected a finite number"}
            parts[name] = number
        return {"score": math.fsum(parts.values()), "parts": parts}
    number = _number(value)
    if isinstance(number, str):
        return {"error": f"the grader returned {number}, expected a finite number"}
    return {"score": number, "parts": {}}


def _number(value: Any) -> float | str:
    """The value as a finite float, or a description of what it is instead."""
    if not isinstance(value, numbers.Real):
        return f"{value!r:.80} ({type(value).__name__})"
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _all_failed(request: Mapping[str, Any], error: str) -> dict[str, Any]:
    return {"id": request["id"], "results": [{"error": error}] * len(request["responses"])}


def _send(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(_line(reply))


def _line(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode() + b"\n"


if __name__ == "__main__":
    main()
