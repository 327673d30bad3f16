"""The wish that a run end soon: a signal or a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chord.train.stop import FILE_VARIABLE, StopWish


def test_a_file_is_a_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "stop"))
    wish = StopWish()
    assert not wish.there()
    (tmp_path / "stop").touch()
    assert wish.there()


def test_a_signal_is_a_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    wish = StopWish()
    try:
        wish.listen()
        assert not wish.there()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wish.there()
    finally:
        signal.signal(signal.SIGUSR1, before)


TERMINATED = """
import signal, sys, time
from megatron_chord.cli import _Termination
termination = _Termination()
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
    """But for one that a launcher hands on right after the first, which is the same."""
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
