"""Renders chat templates in separate processes with limits on time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.data.rows import FatalRowError, RowError
from megatron_chord.records import Message, Tool

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
CPU_S = 10.0
"""Seconds of CPU time that one conversation may take."""
_WAIT_S = 300.0
"""Seconds to wait for an answer. The worker's own limit is CPU time, which takes longer on a busy machine."""


class Renderer:
    """Messages -> text by a Jinja template, as Transformers renders it.

    Safe to call from several threads, which render at the same time: there are as many processes as threads.
    """

    def __init__(self, template: str, names: Mapping[str, Any], source: str, *, cpu_s: float = CPU_S) -> None:
        """
        Args:
            names: variables of the template besides the messages (the tokenizer's special tokens).
            source: origin of the template, for errors.
            cpu_s: seconds of CPU time that one conversation may take.
        """
        self._setting = {"template": template, "names": dict(names), "cpu_s": cpu_s}
        self._source = source
        self._idle: list[_Worker] = []
        self._variables: frozenset[str] | None = None
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), add_generation_prompt: bool
    ) -> str:
        """The conversation as text. A process is started if none is idle. ``tools`` are functions to show.

        Raises:
            RowError: the template refuses the conversation.
            FatalRowError: it took too long or too much memory.
        """
        request = {
            "messages": list(messages),
            "tools": list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._answer(request)["text"]

    @property
    def setting(self) -> Mapping[str, Any]:
        """The template, the variables that it can read, and its limit of CPU time."""
        return self._setting

    def variables(self) -> frozenset[str]:
        """The names that the template may look up when it is rendered, ``messages`` among them.

        Raises:
            RowError: the template is not valid Jinja.
            FatalRowError: reading it took too long or too much memory.
        """
        if self._variables is None:
            self._variables = frozenset(self._answer({})["variables"])
        return self._variables

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is None:
            worker = _Worker(self._setting)
            weakref.finalize(self, worker.end)
        try:
            reply = worker.ask(request)
        except (OSError, ValueError):
            reply = {"exhausted": worker.failure_reason()}
        if "exhausted" in reply:
            worker.end()
            raise FatalRowError(
                f"the chat template ({self._source}) {reply['exhausted']} on this conversation"
            )
        with self._lock:
            self._idle.append(worker)
        if "refused" in reply:
            raise RowError(f"the chat template ({self._source}) refuses the conversation: {reply['refused']}")
        return reply

    def stop_processes(self) -> None:
        """End the processes. A later call starts a new one."""
        with self._lock:
            resting, self._idle = self._idle, []
        for worker in resting:
            worker.end()


class _Worker:
    """A process and our end of its socket."""

    def __init__(self, setting: Mapping[str, Any]) -> None:
        self._cpu_s: float = setting["cpu_s"]
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(_WAIT_S)
        command = [sys.executable, "-P", "-m", "megatron_chord.data.jinja_worker", str(theirs.fileno())]
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._send(setting)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Raises OSError if the process has ended or does not answer, ValueError if its answer is malformed."""
        self._send(request)
        parts = [self._connection.recv(1 << 16)]
        while parts[-1] and not parts[-1].endswith(b"\n"):
            parts.append(self._connection.recv(1 << 16))
        return json.loads(b"".join(parts))

    def failure_reason(self) -> str:
        """Return the reason why there is no answer, as the end of a sentence about the template."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return f"has not been rendered in {_WAIT_S:.0f} s"
        if status == -signal.SIGPROF:
            return f"takes longer than {self._cpu_s:g} s"
        return f"ended the process that renders it (exit status {status})"

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._connection.close()

    def _send(self, request: Mapping[str, Any]) -> None:
        self._connection.sendall(json.dumps(request).encode() + b"\n")
