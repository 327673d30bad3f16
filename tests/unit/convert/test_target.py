"""A folder that appears only when it is complete: its names, its lock, and the leftovers of killed processes."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from megatron_chord.convert.target import atomic_folder, discard
from tests.support.locks import refusing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_target_exists_only_after_success(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "content"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="full"), atomic_folder(tmp_path / "a") as folder:  # noqa: PT012
        (folder / "file").touch()
        raise RuntimeError("full")
    assert names(tmp_path) == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as folder:
        with (
            pytest.raises(ValueError, match=r"another process \(\S+ \d+\) is writing \S+/a: wait"),
            atomic_folder(tmp_path / "a"),
        ):
            pass
        with atomic_folder(tmp_path / "b"):
            pass
        assert folder.is_dir()
    assert names(tmp_path) == ["a", "b"]


def test_a_folder_made_during_the_conversion_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already exists"), atomic_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
    assert names(tmp_path) == ["a"]
    with pytest.raises(ValueError, match="already exists"), atomic_folder(tmp_path / "a"):
        pass


def test_files_of_killed_processes_are_removed_and_reported(tmp_path: Path) -> None:
    dead = tmp_path / ".a.host-123-0123abcd.partial"
    other = tmp_path / ".a.b.host-123-0123abcd.partial"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / ".a.lock").write_text("host 123\n")
    told: list[str] = []
    with atomic_folder(tmp_path / "a", notify=told.append):
        assert not dead.exists()
    assert told == [f"removed {dead}, which a killed process had left"]
    assert names(tmp_path) == [other.name, "a"]


def test_where_files_cannot_be_locked_the_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    (tmp_path / ".a.host-123-0123abcd.partial").mkdir()
    told: list[str] = []
    with atomic_folder(tmp_path / "a", notify=told.append) as one:
        assert told == [f"{tmp_path} has no file locks: what killed processes left there is not removed"]
        with pytest.raises(ValueError, match="already exists"), atomic_folder(tmp_path / "a") as other:  # noqa: PT012
            assert one != other
            (tmp_path / "a").mkdir()
        (tmp_path / "a").rmdir()
    assert names(tmp_path) == [".a.host-123-0123abcd.partial", "a"]


def test_discarding_takes_this_process_s_folders_alone(tmp_path: Path) -> None:
    (tmp_path / ".a.host-123-0123abcd.partial").mkdir()
    with (  # noqa: PT012
        pytest.raises(FileNotFoundError),
        atomic_folder(tmp_path / "b"),
        atomic_folder(tmp_path / "a") as folder,
    ):
        (folder / "file").write_text("content")
        (tmp_path / ".a.host-123-89abcdef.partial").mkdir()  # what another process writes at this time
        discard(tmp_path / "a")
        assert not folder.exists()
    assert names(tmp_path) == [".a.host-123-89abcdef.partial"]
