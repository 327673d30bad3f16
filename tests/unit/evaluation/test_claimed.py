"""Only one evaluation writes to a folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from megatron_chord.evaluation.evaluate import _claimed
from tests.support.locks import refusing


def test_a_second_evaluation_is_refused(tmp_path: Path) -> None:
    told: list[str] = []
    with (
        _claimed(tmp_path, told.append),
        pytest.raises(ValueError, match="another evaluation is writing to"),
        _claimed(tmp_path, told.append),
    ):
        pass
    assert told == []


def test_on_a_file_system_without_locks_it_says_that_none_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    told: list[str] = []
    with _claimed(tmp_path, told.append):
        pass
    assert told == [f"{tmp_path} has no file locks: a second evaluation that writes there is not noticed"]
