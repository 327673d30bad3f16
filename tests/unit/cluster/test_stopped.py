"""The job's only rank is stopped and continued. The test sets the clock."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_chord.cluster.stopped import StoppedRank
from megatron_chord.process_table import state_of

LIMIT_S = 10.0
PROGRAM = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
def main_thread():
    print("ready", flush=True)
    time.sleep(100)
main_thread()
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def wait_until(pid: int, *, stopped: bool) -> None:
    deadline = time.monotonic() + 30
    while (state_of(pid) == "T") != stopped:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_rank_is_named_and_shows_its_stack(process: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text('{"phase": "saving", "at": "here.py:1 save"}')
    watched = StoppedRank(process.pid, rank=0, node="n0", beats=tmp_path, limit_s=LIMIT_S)
    assert watched.look(0.0) is None
    process.send_signal(signal.SIGSTOP)
    wait_until(process.pid, stopped=True)
    assert [watched.look(float(now)) for now in range(1, 12)] == [None] * 11
    assert watched.look(11.5) == (
        f"frozen: rank 0 on n0 (process {process.pid}) has been stopped (SIGSTOP) for 10 s (limit 10 s). "
        "It was saving, at here.py:1 save"
    )
    watched.print_stacks()
    deadline = time.monotonic() + 30
    while "in main_thread" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_goes_on_and_a_job_that_was_suspended_are_no_fault(
    process: subprocess.Popen[str], tmp_path: Path
) -> None:
    watched = StoppedRank(process.pid, rank=0, node="n0", beats=tmp_path, limit_s=LIMIT_S)
    process.send_signal(signal.SIGSTOP)
    wait_until(process.pid, stopped=True)
    assert [watched.look(float(now)) for now in (0, 4, 8)] == [None] * 3
    assert watched.look(1000.0) is None, "nobody looked for long, so the whole job was suspended"
    process.send_signal(signal.SIGCONT)
    wait_until(process.pid, stopped=False)
    assert watched.look(1004.0) is None
    process.send_signal(signal.SIGSTOP)
    wait_until(process.pid, stopped=True)
    assert [watched.look(float(now)) for now in (1008, 1012, 1016)] == [None] * 3
    found = watched.look(1020.0)
    assert found is not None
    assert found.endswith("for 12 s (limit 10 s)"), "no heartbeat, so no phase"
    watched.print_stacks()
    assert state_of(process.pid) == "T", "without a heartbeat it may have no handler, and is left alone"
