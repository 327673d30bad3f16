"""Run a training that is killed again and again and resumed, and report what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chord.process_table import descendants
from megatron_chord.rollout.server import SERVER
from tests.support.task import cli_environment

MARK = "KILLED_RUN"
"""An environment variable that every process of a run inherits, also after its parent has ended."""
MOMENTS = ("starting", "stepping", "saving", "saved")
SHARED_MEMORY = Path("/dev/shm")
_KERNELS = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
"""The folder where torch keeps compiled kernels for later runs. Without it, each run compiles them for its own temp
folder."""
_POLL_S = 0.002


@dataclass(frozen=True)
class Kill:
    victim: str
    """launcher, rank0, rank1 or server. In a run of one rank the launcher is the trainer itself."""
    moment: str
    """One of ``MOMENTS``: after the start, after a step is finished, after a save begins, after a save is finished."""
    delay: float
    """Seconds after the moment."""


@dataclass
class Report:
    kills: list[str] = field(default_factory=list)
    lives: int = 0
    early: int = 0
    """Lives that ended before they could be killed."""
    survivors: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Files in the temp folder or in shared memory after the last life."""


def draw(seed: int, count: int, victims: Sequence[str]) -> list[Kill]:
    """Draw kills with random delays. Victims and moments take turns, so that few kills cover all of both."""
    random_ = random.Random(seed)
    most = {"starting": 12.0, "stepping": 1.0, "saving": 0.06, "saved": 0.3}
    moments = [MOMENTS[(index + index // len(MOMENTS)) % len(MOMENTS)] for index in range(count)]
    return [
        Kill(victims[index % len(victims)], moment, random_.uniform(0.0, most[moment]))
        for index, moment in enumerate(moments)
    ]


def run_through_kills(
    config: Path,
    output: Path,
    kills: Sequence[Kill],
    *overrides: str,
    temp: Path,
    looks_in_shared_memory: bool = True,
    say: Callable[[str], None] = print,
    timeout_s: float = 400.0,
) -> Report:
    """Start the run, kill it, resume it, and so on. The last life runs to the end.

    With ``looks_in_shared_memory``, new files of other programs in shared memory count as files of this run.

    Raises:
        AssertionError: a life that was not killed ended with an exit code other than 0, or made no progress.
    """
    report = Report()
    shared = set(os.listdir(SHARED_MEMORY))
    temp.mkdir(parents=True, exist_ok=True)
    for kill in [*kills, None]:
        report.lives += 1
        mark = uuid.uuid4().hex
        log = output.parent / f"{output.name}-life{report.lives}.txt"
        with _started(config, output, overrides, mark, temp, log) as process:
            if kill is None:
                code = process.wait(timeout_s)
                assert code == 0, f"the last life ended with code {code}:\n{log.read_text()[-3000:]}"
            else:
                _strike(kill, process, output, log, report, timeout_s)
            _await_end(process, mark, report, say)
        say(f"life {report.lives}: {report.kills[-1] if kill else 'to the end'}")
    report.left = [
        *(str(path.relative_to(temp)) for path in temp.iterdir()),
        *(sorted(set(os.listdir(SHARED_MEMORY)) - shared) if looks_in_shared_memory else ()),
        *(str(path) for path in (output / "checkpoints").glob(".*.partial")),
    ]
    return report


def _strike(
    kill: Kill, process: subprocess.Popen[bytes], output: Path, log: Path, report: Report, timeout_s: float
) -> None:
    before = _finished_saves(output), _rows(output)
    deadline = time.monotonic() + timeout_s
    if kill.moment == "starting":
        _sleep(kill.delay, process)
    while process.poll() is None and not _is_due(kill.moment, output, *before):
        assert time.monotonic() < deadline, f"no {kill} within {timeout_s} s:\n{log.read_text()[-3000:]}"
        time.sleep(_POLL_S)
    if kill.moment != "starting":
        _sleep(kill.delay, process)
    pid = _victim(kill.victim, process)
    if pid is None or process.poll() is not None:
        code = process.poll()
        assert code in (None, 0), f"ended with code {code} by itself:\n{log.read_text()[-3000:]}"
        report.early += 1
        pid, name = process.pid, "(no such process: the whole run)"
    else:
        name = kill.victim
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    report.kills.append(f"{name} {kill.delay:.3f} s after {kill.moment}")
    # The run replaces a lost server. It continues until one more step is done; then it is killed.
    done = _rows(output)
    while name == "server" and process.poll() is None and _rows(output) <= done:
        assert time.monotonic() < deadline, f"no step after the server's end:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)
    if name == "server":
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    process.wait(240)


def _is_due(moment: str, output: Path, saves: set[str], rows: int) -> bool:
    if moment == "starting":
        return True
    if moment == "stepping":
        return _rows(output) > rows
    if moment == "saving":
        try:
            return any((output / "checkpoints").glob(".step-*.partial/*.distcp"))
        except FileNotFoundError:  # the folder got its final name between two reads
            return False
    return bool(_finished_saves(output) - saves)


def _await_end(
    process: subprocess.Popen[bytes], mark: str, report: Report, say: Callable[[str], None]
) -> None:
    deadline = time.monotonic() + 120
    while left := _marked(mark):
        if time.monotonic() > deadline:
            report.survivors += [f"{pid}: {name}" for pid, name in left.items()]
            say(f"still there: {left}")
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _started(
    config: Path, output: Path, overrides: Sequence[str], mark: str, temp: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "megatron_chord.cli", "train", str(config), f"output={output}"]
    with log.open("wb") as console:
        process = subprocess.Popen(
            [*command, *overrides, "--resume", "auto"],
            env=cli_environment(TMPDIR=str(temp), TORCHINDUCTOR_CACHE_DIR=str(_KERNELS), **{MARK: mark}),
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _sleep(seconds: float, process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _finished_saves(output: Path) -> set[str]:
    return {path.name for path in (output / "checkpoints").glob("step-*")}


def _rows(output: Path) -> int:
    """Return how many steps are done."""
    path = output / "metrics.jsonl"
    if not path.is_file():
        return 0
    steps = [row["step"] + 1 for line in path.read_text().splitlines() if "loss" in (row := _row(line))]
    return max(steps, default=0)


def _row(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:  # the line is still being written
        return {}


def _victim(name: str, process: subprocess.Popen[bytes]) -> int | None:
    if name == "launcher":
        return process.pid
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if name == "server" and SERVER.encode() in command:
                return pid
            rank = f"\0RANK={name.removeprefix('rank')}\0".encode()
            if name != "server" and b"megatron_chord.cli" in command and rank in environment:
                return pid
    return process.pid if name == "rank0" else None  # a run of one rank is its own launcher


def _marked(mark: str) -> dict[int, str]:
    """Return the live processes of a run without zombies: the command by process id."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and wanted in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (
                        (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
                    )
    return found
