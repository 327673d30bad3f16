"""The run folder: only one run can lock it, and a refused start leaves it unchanged."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chord.config import RunConfig
from megatron_chord.train.folder import claim
from megatron_chord.train.start import _report
from tests.support.locks import refusing
from tests.support.tiny import tiny_run

HOLDERS = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return dataclasses.replace(tiny_run(tmp_path / "model"), output=tmp_path / "out")


def test_a_refused_start_leaves_the_folder_free(run: RunConfig) -> None:
    run.output.mkdir()
    (run.output / "notes.txt").write_text("the user's")
    with claim(run, resume="never", overwrite=False):
        (run.output / "tensorboard").mkdir()
        (run.output / "metrics.jsonl").touch()
    assert sorted(path.name for path in run.output.iterdir()) == [".lock", "notes.txt"]
    with claim(run, resume="never", overwrite=False) as claimed:
        claimed.begin()
        (run.output / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="already has a run"):
        claim(run, resume="never", overwrite=False)
    with claim(run, resume="auto", overwrite=False):  # this is refused, too
        (run.output / "traces").mkdir()
    names = sorted(path.name for path in run.output.iterdir())
    assert names == [".lock", "config.yaml", "metrics.jsonl", "notes.txt"]


def test_a_refused_start_keeps_the_log_that_says_why(run: RunConfig) -> None:
    with claim(run, resume="never", overwrite=False):
        (run.output / "logs" / "rollout-server-1.log").write_text("why")
    assert (run.output / "logs" / "rollout-server-1.log").is_file()


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.ENOLCK])
def test_a_run_starts_on_a_file_system_without_locks(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """Such as Lustre that is mounted without flock, and NFS without its lock daemon."""
    monkeypatch.setattr(fcntl, "flock", refusing(answer))
    told: list[str] = []
    with claim(run, resume="auto", overwrite=False, notify=told.append):
        pass
    assert told == [f"{run.output} has no file locks: a second run that writes there is not noticed"]
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        claim(run, resume="auto", overwrite=False)


def test_a_child_does_not_hold_the_folder(run: RunConfig) -> None:
    lock = str(run.output / ".lock")
    with claim(run, resume="never", overwrite=False):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        with pytest.raises(ValueError, match="another run is writing"):
            claim(run, resume="never", overwrite=False)
    try:
        subprocess.run([sys.executable, "-c", HOLDERS, lock], check=True, timeout=60)
    finally:
        child.kill()
        child.wait()


def test_a_run_ends_with_a_report_or_with_a_line_that_says_why_not(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with claim(run, resume="never", overwrite=False) as claimed:
        _report(claimed)  # a start that was refused leaves none
        claimed.begin()
        (run.output / "metrics.jsonl").write_text('{"step": 0, "reward_mean": 0.5}\n')
    _report(claimed)
    (run.output / "metrics.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    _report(claimed)
    written, failed = capsys.readouterr().out.splitlines()
    assert written == f"report in {run.output / 'report.html'}"
    assert failed.startswith("no report was written: ValueError: ")
    assert (run.output / "report.html").is_file()


def test_a_run_is_replaced_only_by_one_that_begins(run: RunConfig) -> None:
    with claim(run, resume="never", overwrite=False) as claimed:
        claimed.begin()
    for name in ("metrics.jsonl", "report.html", "configs", "checkpoints"):
        (run.output / name).mkdir()
    with claim(run, resume="never", overwrite=True):  # refused
        pass
    assert (run.output / "metrics.jsonl").exists()
    with claim(run, resume="never", overwrite=True) as claimed:
        claimed.begin()
    assert sorted(path.name for path in run.output.iterdir()) == [".lock", "config.yaml", "logs"]
