"""The wish that a run end soon: a signal or a file."""

from __future__ import annotations

import os
import signal
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
