"""A signal or a file can request a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_chord.cli import _resuming
from megatron_chord.train.stop import FILE_VARIABLE, StopRequest


def test_a_file_is_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "stop"))
    request = StopRequest()
    assert not request.is_made()
    (tmp_path / "stop").touch()
    assert request.is_made()


def test_sigusr1_requests_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    request = StopRequest()
    try:
        request.listen()
        assert not request.is_made()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.is_made()
    finally:
        signal.signal(signal.SIGUSR1, before)


TERMINATED = """
import signal, sys, time
from megatron_chord.cli import _Termination
from megatron_chord.train.stop import StopRequest
termination = _Termination(StopRequest(), speaks=True)
signal.signal(signal.SIGTERM, termination.on_signal)
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("leaving", flush=True)
    while True:  # a save that does not end
        time.sleep(0.01)
"""


def test_a_second_sigterm_ends_the_process_now() -> None:
    """A second SIGTERM ends the process. A copy of the first one, which a launcher forwards immediately, does not."""
    process = subprocess.Popen([sys.executable, "-c", TERMINATED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "leaving\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.7)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


INTERRUPTED = """
import signal, sys, time
from megatron_chord.cli import _Termination
from megatron_chord.train.stop import StopRequest
request = StopRequest()
termination = _Termination(request, speaks=True)
signal.signal(signal.SIGINT, termination.on_interrupt)
try:
    if sys.argv[1] == "training":
        termination.check()
    print("ready", flush=True)
    while not request.is_made():
        time.sleep(0.01)
    print("requested", flush=True)
    time.sleep(60)  # a step that takes its time
finally:
    print("leaving", flush=True)
    while True:
        time.sleep(0.01)
"""


def interrupted(when: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, when],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_first_ctrl_c_requests_a_stop_the_second_raises_the_third_ends_the_process() -> None:
    process = interrupted("training")
    try:
        assert process.stdout is not None
        for expected in ("ready", "requested", "leaving"):
            assert process.stdout.readline() == f"{expected}\n"
            time.sleep(0.6)
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
        assert process.stderr is not None
        said = process.stderr.read()
        assert said.count("write a checkpoint at the next safe point") == 1
        assert "Traceback" not in said
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_before_the_first_step_leaves_at_once() -> None:
    process = interrupted("loading")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "leaving\n"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "given",
    [
        ["train", "a b.yaml", "steps=3"],
        ["train", "--overwrite", "a b.yaml", "steps=3"],
        ["train", "a b.yaml", "--resume", "step-40", "steps=3"],
        ["train", "--resume=auto", "a b.yaml", "steps=3"],
    ],
)
def test_the_command_that_continues_a_run(given: list[str]) -> None:
    assert _resuming(given) == "megatron-chord train 'a b.yaml' steps=3 --resume auto"
