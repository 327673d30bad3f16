"""The outcome of a restart of a job, in files that its batch script reads.

    outcome             exit code of the ranks; the first node writes it when its ranks have ended without a failure
    ended               exit code of the run; rank 0 writes it when the policy, or the checkpoint of a stop, is complete
    failures/TIME-...   one file for each failed process, named by the time of its end: the first file is the cause

The first line of a failure file is the exit code, the second says which process failed and how. The end of its log
follows. What fails after ``ended`` was written, when processes end, does not change the exit code of the job.

``reserve`` takes the space for these files when the ranks start, so that a full disk does not prevent a requeue. Until
they are written they are hidden.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_chord.files import overwrite

_OUTCOME = "outcome"
_ENDED = "ended"
_FAILURES = "failures"
_TAIL_LINES = 25
_RESERVED_BYTES = 4096


def reserve(folder: Path, *, failures_of: Iterable[str], on_first_node: bool) -> None:
    """Take the space for a failure of each of these processes, and, on the first node, for the outcome and the end."""
    failures = folder / _FAILURES
    failures.mkdir(exist_ok=True)
    paths = [_hidden(failures / who) for who in failures_of]
    if on_first_node:
        paths += [_hidden(folder / _OUTCOME), _hidden(folder / _ENDED)]
    for path in paths:
        overwrite(path, b" " * _RESERVED_BYTES)


def write_outcome(folder: Path, code: int) -> None:
    _write(folder / _OUTCOME, f"{code}\n")


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
    _write(failures / f"{now:.6f}-{who}", "\n".join(lines) + "\n", reserved=who)


def record_end(code: int) -> None:
    """Record the exit code of the run, if this process is rank 0 of a job. Without the file the exit codes of the ranks
    count, so nothing is raised."""
    folder = os.environ.get("CHORD_JOB")
    if folder is not None and os.environ.get("RANK") == "0":
        with contextlib.suppress(OSError):
            _write(Path(folder) / _ENDED, f"{code}\n")


def recorded_end(folder: Path) -> int | None:
    """The exit code that rank 0 has recorded. None: the run has not ended, or rank 0 failed."""
    try:
        return int((folder / _ENDED).read_text())
    except (OSError, ValueError):
        return None


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _write(path: Path, text: str, *, reserved: str | None = None) -> None:
    """Write a file. On a full disk it is cut to the bytes that were reserved. ``reserved`` is the name under which they
    were, if that is not the file's own."""
    hidden, content = _hidden(path.with_name(reserved or path.name)), text.encode()
    try:
        overwrite(hidden, content)
    except OSError:
        content = content[:_RESERVED_BYTES]
        overwrite(hidden, content)
    os.truncate(hidden, len(content))
    hidden.replace(path)


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
