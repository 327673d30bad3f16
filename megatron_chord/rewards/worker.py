"""One grader process: `python -m megatron_chord.rewards.worker`, started by `rewards.pool` and nobody else.

It reads a `Response` and answers ``{"score"}`` or ``{"error"}``, a JSON line each, over the socket it
inherits. It assumes that the text is hostile and that the grading library swallows exceptions: what it forbids and
what it runs out of is noted on the side, so that neither can pass for a wrong answer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from megatron_chord.processes import die_with_parent
from megatron_chord.rewards.response import Response
from megatron_chord.rewards.table import from_json

_MAX_FILE_BYTES = 1 << 20  # its stderr, and nothing else
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "urllib.", "http.")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
_EXHAUSTION = (MemoryError, RecursionError)
# What sympy's own parser evaluates when it is given a number: Integer (2 ), Float ('1.5' ).
_NUMBER_CODE = re.compile(r"\s*-?\s*(?:Integer|Float|Rational)\s*\(\s*'?[0-9.eE+-]+'?\s*\)\s*")


class Watch:
    """Notes what went wrong during one grading, also when the grader caught it."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.exhausted = False

    def start(self) -> None:
        self.findings.clear()
        sys.settrace(self._trace_call)

    def stop(self) -> None:
        # Python drops a trace function that fails, which ours does only for want of stack or memory.
        if sys.gettrace() is None:
            self.findings.append("ran out of stack")
        sys.settrace(None)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Hook for `sys.addaudithook`: no processes, no network, no written files."""
        if event == "open":
            forbidden = bool((args[2] or 0) & _WRITE_FLAGS)
        else:
            forbidden = event.startswith(_FORBIDDEN) and event not in _HARMLESS
        if forbidden:
            self.refuse(f"tried {event}")

    def refuse(self, finding: str) -> None:
        self.findings.append(finding)
        raise PermissionError(f"a grader {finding}")

    def _trace_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_lines = False
        return self._trace_exception

    def _trace_exception(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception" and issubclass(arg[0], _EXHAUSTION):
            # Keep the exception no longer than this: it holds the frames that hold the memory.
            self.findings.append(f"ran out of {'memory' if issubclass(arg[0], MemoryError) else 'stack'}")
            self.exhausted = self.exhausted or issubclass(arg[0], MemoryError)
        return self._trace_exception


def main() -> None:
    options = _options()
    reward = from_json(json.loads(options.settings))
    _confine(options.parent, reward.memory_mb << 20)
    connection = socket.socket(fileno=options.fd)
    grader = reward.load()  # only now, under the memory limit: importing is the expensive part
    if reward.EXAMPLE is not None:
        grader(reward.EXAMPLE)
    watch = Watch()
    _guard_sympy(watch)
    _send(connection, {"ready": True})
    sys.addaudithook(watch.audit)
    for line in connection.makefile("rb"):
        grading = partial(grader, Response(**json.loads(line)))
        _send(connection, _answer(watch, grading))
        if watch.exhausted:
            return  # the pool starts a fresh one


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--settings", required=True)
    return parser.parse_args()


def _confine(parent: int, memory_bytes: int) -> None:
    die_with_parent(parent)
    # Signals meant for the run reach every process of a Slurm step; the pool decides when a worker ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _guard_sympy(watch: Watch) -> None:
    """In the process of a grader that has imported sympy."""
    parser = sys.modules.get("sympy.parsing.sympy_parser")
    if parser is not None:
        vars(parser)["eval_expr"] = _only_numbers(vars(parser)["eval_expr"], watch)


def _only_numbers(eval_expr: Any, watch: Watch) -> Any:
    """sympy turns every written number into code and evaluates that; nothing else may get there."""

    def checked(code: str, local_dict: Any, global_dict: Any) -> Any:
        if not _NUMBER_CODE.fullmatch(code):
            watch.refuse(f"tried to evaluate {code[:80]!r}")
        return eval_expr(code, local_dict, global_dict)

    return checked


def _answer(watch: Watch, grade: Callable[[], float]) -> dict[str, Any]:
    watch.start()
    try:
        score = float(grade())
    except Exception as error:  # the boundary: whatever a grader raises is this grading's error, not a crash
        watch.exhausted = watch.exhausted or isinstance(error, MemoryError)
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        watch.stop()
    if watch.findings and score != 1.0:  # a proof of equality stands whatever failed on the way to it
        return {"error": f"the grader {watch.findings[0]}"}
    if not math.isfinite(score):
        return {"error": f"the grader returned {score}"}
    return {"score": score}


def _send(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
