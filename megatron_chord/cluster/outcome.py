"""The outcome of a restart of a job, in files that its batch script reads.

    outcome             exit code of the ranks; the first node writes it when its ranks have ended without a failure
    failures/TIME-...   one file for each failed process, named by the time of its end: the first file is the cause

The first line of a failure file is the exit code, the second says which process failed and how. The end of its log
follows.

``reserve`` takes the space for these files when the ranks start, so that a full disk does not prevent a requeue. Until
they are written they are hidden.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_chord.files import overwrite

_OUTCOME = "outcome"
_FAILURES = "failures"
_TAIL_LINES = 25
_RESERVED_BYTES = 4096


def reserve(folder: Path, *, failures_of: Iterable[str], with_outcome: bool) -> None:
    """Take the space for a failure of each of these processes, and for the outcome if this node writes it."""
    failures = folder / _FAILURES
    failures.mkdir(exist_ok=True)
    paths = [_hidden(failures / who) for who in failures_of]
    for path in [*paths, _hidden(folder / _OUTCOME)] if with_outcome else paths:
        overwrite(path, b" " * _RESERVED_BYTES)


def write_outcome(folder: Path, code: int) -> None:
    _write(_hidden(folder / _OUTCOME), f"{code}\n")
    _hidden(folder / _OUTCOME).replace(folder / _OUTCOME)


def has_outcome(folder: Path) -> bool:
    return (folder / _OUTCOME).exists()


def record_failure(folder: Path, who: str, code: int, message: str, log: Path | None = None) -> None:
    """Record that the process ``who`` (no slashes) failed now, with the end of its ``log``."""
    now = time.time()
    failures = folder / _FAILURES
    failures.mkdir(exist_ok=True)
    lines = [str(code), message]
    if log is not None:
        lines += [f"The end of {log}:", *tail(log)]
    temporary = _hidden(failures / who)
    _write(temporary, "\n".join(lines) + "\n")
    temporary.replace(failures / f"{now:.6f}-{who}")


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _write(path: Path, text: str) -> None:
    """Write a file; on a full disk only as much as was reserved for it."""
    content = text.encode()
    try:
        overwrite(path, content)
    except OSError:
        content = content[:_RESERVED_BYTES]
        overwrite(path, content)
    os.truncate(path, len(content))


def has_failure(folder: Path) -> bool:
    """Whether a process of this restart of the job has failed, on any node."""
    return any(not path.name.startswith(".") for path in (folder / _FAILURES).glob("*"))


def exit_code_of(status: int) -> int:
    """A shell's exit code for a ``Popen.returncode``: 128 + n if signal n ended the process."""
    return status if status >= 0 else 128 - status


def described(status: int) -> str:
    """``exited with code 3`` or ``was killed by SIGSEGV``."""
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def tail(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError as error:
        return [f"(no log: {error})"]
