"""Failures of a job are recorded in files, and the first failure is found."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from megatron_chord.cluster.outcome import (
    described,
    exit_code_of,
    has_failure,
    has_outcome,
    record_end,
    record_failure,
    recorded_end,
    reserve,
    write_outcome,
)
from tests.support.full_disk import fill, small_disk


def test_failures_are_listed_in_the_order_of_their_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    for rank in (7, 3, 5):
        record_failure(tmp_path, f"rank{rank}", 128 + rank, f"rank {rank} failed", log)
    files = sorted((tmp_path / "failures").iterdir())
    assert [file.name.rpartition("-")[2] for file in files] == ["rank7", "rank3", "rank5"]
    lines = files[0].read_text().splitlines()
    assert lines[:3] == ["135", "rank 7 failed", f"The end of {log}:"]
    assert lines[3:] == [f"line {i}" for i in range(75, 100)]


def test_a_missing_log_is_said_to_be_missing(tmp_path: Path) -> None:
    record_failure(tmp_path, "rank0", 1, "gone", tmp_path / "nowhere")
    (file,) = (tmp_path / "failures").iterdir()
    assert "no log" in file.read_text()


def test_a_full_disk_hides_no_outcome_no_end_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long failure the beginning is kept."""
    folder, log = tmp_path / "job", tmp_path / "log"
    log.write_text("".join(f"line {i} {'x' * 400}\n" for i in range(25)))
    with small_disk(folder):
        reserve(folder, failures_of=["rank3", "rank4"], on_first_node=True)
        assert not has_failure(folder)
        assert not has_outcome(folder)
        fill(folder)
        record_failure(folder, "rank3", 137, "rank 3 was killed", log)
        record_failure(folder, "rank4", 1, "rank 4 failed")
        monkeypatch.setenv("CHORD_JOB", str(folder))
        monkeypatch.setenv("RANK", "0")
        assert recorded_end(folder) is None
        record_end(75)
        assert recorded_end(folder) == 75
        write_outcome(folder, 75)
        assert (folder / "outcome").read_text() == "75\n"
        first, second = sorted(path for path in (folder / "failures").iterdir())
        assert first.read_text().startswith(f"137\nrank 3 was killed\nThe end of {log}:\nline 0 xxx")
        assert second.read_text() == "1\nrank 4 failed\n"


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (3, 3, "exited with code 3"),
        (-signal.SIGKILL, 137, "was killed by SIGKILL"),
        (-signal.SIGSEGV, 139, "was killed by SIGSEGV"),
        (-63, 191, "was killed by signal 63"),
    ],
)
def test_exit_codes(status: int, code: int, text: str) -> None:
    assert exit_code_of(status) == code
    assert described(status) == text


def test_only_rank_0_of_a_job_records_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("CHORD_JOB", raising=False)
    record_end(75)
    monkeypatch.setenv("CHORD_JOB", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    record_end(75)
    assert recorded_end(tmp_path) is None
    monkeypatch.setenv("CHORD_JOB", str(tmp_path / "absent"))
    monkeypatch.setenv("RANK", "0")
    record_end(75)
    assert not (tmp_path / "absent").exists()


def test_outcome(tmp_path: Path) -> None:
    assert not has_outcome(tmp_path)
    write_outcome(tmp_path, 75)
    assert has_outcome(tmp_path)
    assert (tmp_path / "outcome").read_text() == "75\n"
