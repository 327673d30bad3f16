"""An evaluation starts when all files of its suite exist, and when no other evaluation writes to its folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from megatron_chord.config_io import load_suite
from megatron_chord.evaluation.evaluate import _claimed, check_suite
from tests.support.locks import refusing
from tests.support.ranks import ROOT


def test_missing_files_are_told_at_once_with_the_command_that_makes_them(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "data: files\nreward: {kind: exact}\nbenchmarks:\n"
        "  - {name: a, file: a.jsonl, prepare: python tools/prepare.py a}\n"
        "  - {name: b, file: b.jsonl}\n"
    )
    with pytest.raises(
        ValueError, match=r"(?s)a: .*a\.jsonl does not exist: make it with `python tools/prepare.py a`.*b: "
    ) as error:
        check_suite(load_suite(path))
    assert f"must be in {tmp_path / 'files'}. data=FOLDER" in str(error.value)


def test_the_papers_suite_says_how_its_files_are_made() -> None:
    with pytest.raises(
        ValueError, match=r"evaluation\.jsonl does not exist: make it with `python tools/prepare.py"
    ):
        check_suite(load_suite(ROOT / "examples" / "suites" / "paper.yaml", ["data=nowhere"]))


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
