"""Real processes are killed. Their folders and children must go away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_chord.processes import SHARED_MEMORY, PrivateFolder, remove_stale
from tests.support.locks import refusing
from tests.support.processes import is_alive

OWNER = """
import subprocess, sys
from pathlib import Path
from megatron_chord.processes import PrivateFolder
folder = PrivateFolder(Path(sys.argv[1]))
(folder.path / "something").write_text("here")
folder.also_remove({sys.argv[2]})
child = subprocess.Popen(["sleep", "60"], close_fds=False)  # a child has none of this process's locks
print(folder.path, child.pid, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def owner(place: Path, shared: str = "nothing") -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a private folder in ``place`` and a child that outlives it."""
    command, pipe = [sys.executable, "-c", OWNER, str(place), shared], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        child = None
        try:
            assert process.stdout is not None
            path, child = process.stdout.readline().split()
            yield process, Path(path)
        finally:
            process.kill()
            if child is not None:
                os.kill(int(child), signal.SIGKILL)


def test_the_next_process_removes_the_folder_of_a_killed_one(tmp_path: Path) -> None:
    shared = SHARED_MEMORY / f"test-processes-{os.getpid()}"
    shared.touch()
    try:
        with owner(tmp_path, shared.name) as (process, path):
            process.kill()
            process.wait()
            assert (path / "something").is_file()
            with contextlib.closing(PrivateFolder(tmp_path)) as folder:
                assert list(tmp_path.iterdir()) == [folder.path]
            assert not shared.exists()
        assert list(tmp_path.iterdir()) == []
    finally:
        shared.unlink(missing_ok=True)


def test_the_folder_of_a_live_process_stays(tmp_path: Path) -> None:
    (tmp_path / "somebody-else's").mkdir()
    with owner(tmp_path) as (process, path):
        remove_stale(tmp_path)
        assert (path / "something").is_file()
        assert process.stdin is not None
        process.stdin.close()  # a clean end; the child holds stdout open, so do not read to its end
        process.wait(30)
        assert not path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-else's"]


def test_without_file_locks_folders_are_made_and_none_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    with (
        contextlib.closing(PrivateFolder(tmp_path)) as first,
        contextlib.closing(PrivateFolder(tmp_path)) as second,
    ):
        assert {path.name for path in tmp_path.iterdir()} == {first.path.name, second.path.name}


def test_names_beside_shared_memory_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    place = tmp_path / "place"
    place.mkdir()
    with owner(place, f"../../{kept}") as (process, path):
        process.kill()
        process.wait()
        remove_stale(place)
        assert not path.exists()
    assert kept.exists()


CHILD = """
import os, sys, time
from megatron_chord.processes import die_with_parent
die_with_parent(int(sys.argv[1]))
print("alive", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "alive\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("parent", [1, os.getpid() + 1], ids=["init", "another"])
def test_a_child_ends_if_its_parent_has_already_ended(parent: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(parent)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""
