"""The watchdog names the right rank in time and saves stacks. Small programs act as ranks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_chord.process_table import descendants
from megatron_chord.runtime.heartbeat import EXIT_CODE, Limits, Pulse, Watch, read_verdict
from tests.support.full_disk import make_read_only, make_writable, small_disk
from tests.support.ranks import ROOT

BEAT_S = 0.25
SILENCE_S = 2.0
PROGRAM = f"""
import pathlib, subprocess, sys, time
from megatron_chord.runtime.heartbeat import Limits, Pulse, Watch

rank, ranks, folder, seconds = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), float(sys.argv[4])
pulse = Pulse()
limits = Limits(beat_s={BEAT_S}, silence_s={SILENCE_S}, phases={{"computing": {SILENCE_S}, "saving": 60.0}})
beats = folder / "beats" / "x" if ranks > 1 else None
watch = Watch(pulse, limits, rank=rank, world_size=ranks, folder=beats, logs=folder / "logs")
child = subprocess.Popen(["sleep", "100"])

def main_thread_stands_still():
    time.sleep(100)

end = time.monotonic() + seconds
with pulse.phase("computing"):
    while time.monotonic() < end:
        pulse.tick()
        time.sleep(0.05)
        if (folder / f"still-{{rank}}").exists():
            main_thread_stands_still()
watch.close()
child.kill()
"""


class Ranks:
    def __init__(self, folder: Path, count: int, seconds: float = 60) -> None:
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(rank), str(count), str(folder), str(seconds)],
                stderr=(folder / f"err-{rank}").open("w"),
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            for rank in range(count)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def await_beats(self) -> None:
        """Wait until each rank has been in its loop."""
        deadline = time.monotonic() + 240
        while not all("computing" in self.beat(rank) for rank in range(len(self.processes))):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def beat(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "beats" / "x" / f"rank-{rank}.json").read_text()
        return ""

    def errors(self) -> str:
        return "".join((self.folder / f"err-{rank}").read_text() for rank in range(len(self.processes)))

    def stacks(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.folder / "logs").glob("frozen-*/*")}


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_stopped_process_is_named_by_those_that_run(tmp_path: Path, frozen: int) -> None:
    """Rank 0 watches all ranks, and all ranks watch rank 0."""
    with Ranks(tmp_path, 3) as ranks:
        ranks.await_beats()
        stopped = ranks.processes[frozen]
        stopped.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        running = [process for process in ranks.processes if process is not stopped]
        assert {process.wait(240) for process in running} == {EXIT_CODE}
        assert time.monotonic() - begun >= SILENCE_S
        (line,) = ranks.errors().splitlines()
        assert f"frozen: rank {frozen} on " in line
        assert f"(process {stopped.pid})" in line
        assert "it is stopped (SIGSTOP)" in line
        assert "It was computing, at <string>:" in line
        seconds = float(re.findall(r"no heartbeat for (\d+) s", line)[0])
        assert SILENCE_S <= seconds <= SILENCE_S + 2 * BEAT_S + 30, "the machine may be slow"
        stacks = ranks.stacks()
        others = {f"rank-{rank}.txt" for rank in range(3) if rank != frozen}
        assert set(stacks) == others | {"all-ranks.txt"}
        assert all("in <module>" in stacks[name] for name in others)
        assert all(f"rank {rank} on" in stacks["all-ranks.txt"] for rank in range(3))
        verdict = read_verdict(tmp_path / "beats" / "x")
        assert verdict is not None
        assert verdict["text"] in line
        assert not any(descendants(process.pid) for process in running), "what they started has ended too"


@contextlib.contextmanager
def watches(folder: Path) -> Iterator[list[Watch]]:
    """The watchdogs of two ranks. Their threads sleep, so a test decides at which times they look."""
    limits = Limits(beat_s=1000, silence_s=SILENCE_S, phases={"computing": 3600.0})
    found = [Watch(Pulse(), limits, rank=rank, world_size=2, folder=folder, logs=folder) for rank in range(2)]
    try:
        yield found
    finally:
        for watch in found:
            watch.close()


def test_a_heartbeat_needs_no_space_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file keeps its length. If nothing can be written, the last heartbeat is still there."""
    beats: list[bytes] = []

    def write(descriptor: int, content: bytes) -> int:
        beats.append((tmp_path / "rank-0.json").read_bytes())
        raise OSError(errno.ENOSPC, "No space left on device")

    with watches(tmp_path) as (watch, _), monkeypatch.context() as patch:
        watch._pulse.enter("waiting for servers")
        assert watch._beat()
        patch.setattr(os, "write", write)
        assert not watch._beat()
        assert not watch._beat()
        assert beats == [(tmp_path / "rank-0.json").read_bytes()] * 2
        assert json.loads(beats[0])["count"] == 2
    assert len(beats[0]) == 1024


def test_no_rank_counts_as_silent_for_one_that_cannot_write_itself(tmp_path: Path) -> None:
    with small_disk(tmp_path / "beats"), watches(tmp_path / "beats") as (zero, one):
        start = time.monotonic()
        assert one._beat()
        assert zero._look(start) is None
        make_read_only(tmp_path / "beats")
        assert zero._look(start + 0.9 * SILENCE_S) is None
        assert zero._look(start + 1.8 * SILENCE_S) is None
        make_writable(tmp_path / "beats")
        assert zero._look(start + 2.7 * SILENCE_S) is None
        found = zero._look(start + 2.9 * SILENCE_S)
        assert found is not None
        assert "rank 1 on" in found["text"]
        assert "has written no heartbeat" in found["text"]


def test_a_file_system_that_hangs_does_not_keep_a_frozen_rank_alive(tmp_path: Path) -> None:
    """The heartbeat is a FIFO that nobody reads. The thread that opens it waits for ever, as on a lost file server."""
    with Ranks(tmp_path, 2) as ranks:
        ranks.await_beats()
        beat = tmp_path / "beats" / "x" / "rank-1.json"
        os.mkfifo(tmp_path / "fifo")
        # Rank 1 is stopped until all is prepared, so the next thing that it does is to write its heartbeat. Rank 0 is
        # killed, because it would name rank 1.
        ranks.processes[1].send_signal(signal.SIGSTOP)
        (tmp_path / "fifo").replace(beat)
        (tmp_path / "still-1").touch()
        ranks.processes[0].kill()
        ranks.processes[0].wait()
        ranks.processes[1].send_signal(signal.SIGCONT)
        assert ranks.processes[1].wait(240) == EXIT_CODE
        error = (tmp_path / "err-1").read_text()
        assert "frozen: rank 1 on " in error
        assert "its watchdog hangs, too" in error
        assert "It was computing, at <string>:" in error
        assert "in main_thread_stands_still" in error
        assert not descendants(ranks.processes[1].pid)


@pytest.mark.parametrize("still", [0, 1])
def test_a_main_thread_that_stands_still_is_named_though_its_process_beats(
    tmp_path: Path, still: int
) -> None:
    with Ranks(tmp_path, 2) as ranks:
        ranks.await_beats()
        (tmp_path / f"still-{still}").touch()
        assert [process.wait(240) for process in ranks.processes] == [EXIT_CODE] * 2
        (line,) = ranks.errors().splitlines()
        assert f"frozen: rank {still} on " in line
        assert "has made no progress for 2 s (limit 2 s)" in line
        assert "main_thread_stands_still" in line
        assert "main_thread_stands_still" in ranks.stacks()[f"rank-{still}.txt"]


def test_a_world_of_one_watches_itself(tmp_path: Path) -> None:
    with Ranks(tmp_path, 1) as ranks:
        (tmp_path / "still-0").touch()
        assert ranks.processes[0].wait(240) == EXIT_CODE
        assert "frozen: rank 0 on " in ranks.errors()
        assert not (tmp_path / "beats").exists()


def test_a_run_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z, or a scheduler that suspends jobs, stops all ranks at once. This is not a fault."""
    with Ranks(tmp_path, 2, seconds=8) as ranks:
        ranks.await_beats()
        for process in ranks.processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(2 * SILENCE_S)
        for process in ranks.processes:
            process.send_signal(signal.SIGCONT)
        assert [process.wait(240) for process in ranks.processes] == [0, 0]
        assert ranks.errors() == ""


def test_ranks_that_finish_are_not_reported_and_leave_no_file(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, seconds=1) as ranks:
        assert [process.wait(240) for process in ranks.processes] == [0, 0]
        assert ranks.errors() == ""
        assert not (tmp_path / "beats").exists()


def test_only_what_the_main_thread_waits_for_counts_as_its_progress() -> None:
    pulse = Pulse()
    with pulse.phase("computing"):
        before = pulse.read()
        pulse.progress_elsewhere("collecting")
        assert pulse.read() == before
        with pulse.phase("collecting"):
            entered = pulse.read()
            assert entered.position == before.position + 1
            time.sleep(0.01)
            pulse.progress_elsewhere("collecting")
            assert pulse.read().moved > entered.moved
            assert pulse.read().position == entered.position, "ranks must count alike"
        assert pulse.read().phase == "computing"
    assert json.dumps(pulse.read().phase) == '"loading"'


def test_a_rank_that_was_stopped_while_it_wrote_is_still_reported(tmp_path: Path) -> None:
    """A heartbeat is written in place, so a process that is stopped at that moment leaves an incomplete file."""
    limits = Limits(beat_s=60, silence_s=120, phases={})
    watch = Watch(Pulse(), limits, rank=0, world_size=2, folder=tmp_path / "x", logs=tmp_path)
    try:
        beat = {
            "count": 1,
            "node": "n",
            "pid": 1,
            "phase": "computing",
            "position": 3,
            "still_s": 0.0,
            "at": "f",
        }
        file = tmp_path / "x" / "rank-1.json"
        file.write_text(json.dumps(beat))
        assert watch._silence(time.monotonic()) is None
        file.write_text(json.dumps(beat)[:20])
        assert watch._beats()[1] == beat
    finally:
        watch.close()
