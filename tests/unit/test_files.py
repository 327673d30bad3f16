"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.files import write_whole
from tests.support.full_disk import fill, small_disk


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("first, and longer", "näxt"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):  # noqa: PT011 (whatever the system says)
        write_whole(tmp_path / "none" / "page.html", "text")
    folder = tmp_path / "page.html"
    folder.mkdir()
    with pytest.raises(OSError):  # noqa: PT011
        write_whole(folder, "text")
    assert [*tmp_path.iterdir()] == [folder]


def test_on_a_full_disk_the_file_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder):
        path = folder / "page.html"
        path.write_text("before")
        fill(folder)
        before = sorted(folder.iterdir())
        with pytest.raises(OSError):  # noqa: PT011
            write_whole(path, "after" * 1000)
        assert path.read_text() == "before"
        assert sorted(folder.iterdir()) == before
