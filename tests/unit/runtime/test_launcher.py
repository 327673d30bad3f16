"""The launcher of one machine's ranks, with small programs as ranks: signals, exit codes, and leftover processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_chord.process_table import descendants, state_of
from megatron_chord.runtime.launcher import LISTENER_VARIABLE, Launcher
from tests.support.listening import addresses
from tests.support.ranks import ROOT

WAIT = "import os, pathlib, signal, sys, time; rank = int(os.environ['RANK'])\n"
READY = "pathlib.Path(sys.argv[1], str(rank)).touch()\n"


@contextmanager
def launched(folder: Path, program: str, ranks: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Start ranks that run ``program``. The context begins when all of them have printed that they are ready."""
    command = [
        sys.executable,
        "-m",
        "megatron_chord.runtime.launcher",
        str(ranks),
        "-c",
        WAIT + program,
        str(folder),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < ranks and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_ranks_get_their_numbers_and_rank_0_the_listening_socket(tmp_path: Path) -> None:
    program = f"""
names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "{LISTENER_VARIABLE}")
text = " ".join(os.environ.get(name, "none") for name in names)
pathlib.Path(sys.argv[1], str(rank)).write_text(text)
time.sleep(60)
"""
    with launched(tmp_path, program) as process:
        places = [(tmp_path / str(rank)).read_text().split() for rank in (0, 1)]
        assert [place[:3] for place in places] == [["2", "0", "127.0.0.1"], ["2", "1", "127.0.0.1"]]
        assert places[0][3] == places[1][3]
        assert places[0][4].isdigit()
        assert places[1][4] == "none"
        ranks = descendants(process.pid)
        assert addresses(ranks) == {"127.0.0.1"}
        assert addresses([process.pid]) == set()


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((2, 2), 2), ((0, 3), 3)])
def test_the_exit_code_is_the_ranks_own(tmp_path: Path, codes: tuple[int, int], expected: int) -> None:
    with launched(tmp_path, f"{READY}sys.exit({codes}[rank])") as process:
        assert process.wait(30) == expected


def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path: Path) -> None:
    program = f"{READY}os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)"
    with launched(tmp_path, program) as process:
        _, text = process.communicate(timeout=30)
    assert process.returncode == 137
    assert text == "error: rank 1 was killed by SIGKILL\n"


def test_a_failed_rank_does_not_wait_for_one_that_is_stopped(tmp_path: Path) -> None:
    program = f"{READY}os.kill(os.getpid(), signal.SIGSTOP) if rank else sys.exit(79)"
    with launched(tmp_path, program) as process:
        assert process.wait(30) == 79


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank_once(tmp_path: Path, number: int) -> None:
    program = f"""
def note(number, frame):
    with pathlib.Path(sys.argv[1], f"got-{{rank}}").open("a") as file:
        file.write(f"{{number}} ")
    time.sleep(0.3)
    sys.exit(75)
signal.signal({int(number)}, note)
{READY}
time.sleep(60)
"""
    with launched(tmp_path, program) as process:
        process.send_signal(number)
        assert process.wait(30) == 75
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == [f"{int(number)} "] * 2


def test_nothing_outlives_the_launcher(tmp_path: Path) -> None:
    program = (
        f"from megatron_chord.runtime.launcher import end_with_launcher as e; e()\n{READY}time.sleep(60)"
    )
    with launched(tmp_path, program) as process:
        ranks = descendants(process.pid)
        assert len(ranks) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while any(state_of(pid) not in (None, "Z") for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_first_ctrl_c_leaves_the_ranks_time_for_a_checkpoint() -> None:
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        launcher = Launcher(0, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert launcher._kill_at is None
        os.kill(os.getpid(), signal.SIGINT)
        assert launcher._kill_at is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
