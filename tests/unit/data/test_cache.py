from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chord.data import cache
from megatron_chord.data.cache import cached_loader, read_entry, write_entry
from megatron_chord.data.cursor import fingerprint
from megatron_chord.data.demonstrations import load_demonstrations
from megatron_chord.data.rows import DataError
from megatron_chord.data.templates import ChatTemplate
from tests.support.files import write_rows

SETTINGS: dict[str, Any] = {
    "max_prompt_tokens": 60,
    "max_response_tokens": 60,
    "overlong": "drop",
    "max_dropped": 0.5,
}
ROWS = [
    {"problem": "1+1?", "solution": "2", "id": "é"},
    {"problem": "x" * 200, "solution": "too long"},
    {"problem": "2+2?"},
    {"messages": [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b")] * 2]},
]


class Counting:
    """``load_demonstrations``, with a count of its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **how: Any) -> Any:
        self.calls += 1
        return load_demonstrations(*args, **how)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHED_FROM_BYTES", 1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "d.jsonl", *ROWS)


def test_what_is_remembered_is_what_was_loaded(rows: Path, tmp_path: Path, chatml: ChatTemplate) -> None:
    load = Counting()
    remembered = cached_loader(load, tmp_path / "cache", SETTINGS)
    expected, report = load_demonstrations(rows, chatml, **SETTINGS, source="s")
    for calls in (1, 1, 1):
        found, found_report = remembered(rows, chatml, source="s")
        assert load.calls == calls
        assert found == expected
        assert found_report == report
    assert len(report.dropped) == len(report.overlong) == 1
    assert [one.id for one in found] == ["é", "d.jsonl:4"]
    assert fingerprint(found) == fingerprint(expected)
    assert isinstance(np.asarray(found[0].token_ids._values).base, np.memmap | np.ndarray)  # type: ignore[union-attr]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_everything_that_changes_the_rows_makes_another_entry(
    rows: Path, tmp_path: Path, chatml: ChatTemplate, plain: ChatTemplate
) -> None:
    import dataclasses

    load = Counting()
    folder = tmp_path / "cache"

    def read(
        data: Path = rows, template: ChatTemplate = chatml, more: dict[str, Any] | None = None, **how: Any
    ) -> int:
        before = load.calls
        cached_loader(load, folder, {**SETTINGS, **(more or {})})(data, template, **how)
        return load.calls - before

    assert (read(), read()) == (1, 0)
    assert read(template=plain) == 1
    assert read(template=dataclasses.replace(chatml, system_prompt="Be short.")) == 1
    assert read(more={"max_prompt_tokens": 61}) == 1
    assert read(fields={"problem": "problem", "solution": "solution"}, more={"max_dropped": 0.9}) == 1
    other = shutil.copy(rows, tmp_path / "other.jsonl")
    assert read(data=Path(other)) == 1  # rows are named by their file
    rows.write_bytes(rows.read_bytes().replace(b"1+1", b"1+3"))
    assert (read(), read()) == (1, 0)


def test_a_damaged_entry_is_read_anew_and_replaced(rows: Path, tmp_path: Path, chatml: ChatTemplate) -> None:
    load = Counting()
    remembered = cached_loader(load, tmp_path / "cache", SETTINGS)
    expected, _ = remembered(rows, chatml)
    (entry,) = (tmp_path / "cache").iterdir()
    for name in ("token_ids", "trainable", "demonstrations.json"):
        path = entry / name
        whole = path.read_bytes()
        path.unlink()  # mapped by `expected`
        path.write_bytes(whole[:-1])
        assert read_entry(entry) is None
        assert remembered(rows, chatml)[0] == expected
        assert path.read_bytes() == whole
    assert load.calls == 4
    (entry / "token_ids").unlink()
    assert remembered(rows, chatml)[0] == expected
    assert list((tmp_path / "cache").iterdir()) == [entry]


def _write(entry: Path, count: int, barrier: Any, failures: Any) -> None:
    from megatron_chord.data.rows import LoadReport
    from megatron_chord.records import Demonstration

    one = Demonstration(id="1", token_ids=(1, 2, 3), trainable=(False, True, True))
    barrier.wait(60)
    try:
        for _ in range(count):
            write_entry(entry, [one] * 50, LoadReport(data="d", num_rows=50, num_kept=50, num_overlong=0))
            found = read_entry(entry)
            assert found is not None
            assert found[0] == [one] * 50
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_several_writers_leave_one_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, failures = context.Barrier(3), context.Queue()
    entry = tmp_path / "cache" / "entry"
    writers = [context.Process(target=_write, args=(entry, 20, barrier, failures)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0], failures.get(timeout=1)
    assert list(entry.parent.iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_is_no_error(rows: Path, tmp_path: Path, chatml: ChatTemplate) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    load = Counting()
    found, _ = cached_loader(load, file / "cache", SETTINGS)(rows, chatml)
    assert len(found) == 2
    assert load.calls == 1


DAY = 86400


def make_entry(folder: Path, letter: str, unused_days: float) -> Path:
    from megatron_chord.data.rows import LoadReport
    from megatron_chord.records import Demonstration

    entry = folder / (letter * 40)
    one = Demonstration(id="1", token_ids=(1,) * 200, trainable=(True,) * 200)
    write_entry(entry, [one], LoadReport(data="d", num_rows=1, num_kept=1, num_overlong=0))
    used = time.time() - unused_days * DAY
    os.utime(entry / "demonstrations.json", (used, used))
    return entry


def test_entries_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    new, old = make_entry(tmp_path, "a", 29), make_entry(tmp_path, "b", 31)
    note = tmp_path / "note.txt"
    note.write_text("mine")
    (tmp_path / "folder").mkdir()
    cache.prune(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, note, tmp_path / "folder"])
    assert not old.exists()


def test_beyond_the_limit_the_entries_longest_unused_go_but_none_that_may_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [make_entry(tmp_path, letter, days) for letter, days in zip("abcd", (1, 6, 8, 9), strict=True)]
    size = sum(file.stat().st_size for file in entries[0].rglob("*"))
    folder_bytes = entries[0].stat().st_size
    monkeypatch.setattr(cache, "KEPT_BYTES", 3 * (size + folder_bytes))
    cache.prune(tmp_path)
    assert sorted(tmp_path.iterdir()) == entries[:3]
    monkeypatch.setattr(cache, "KEPT_BYTES", 1)
    cache.prune(tmp_path)
    assert sorted(tmp_path.iterdir()) == entries[:2]


def test_files_of_a_killed_writer_are_removed_and_files_being_written_are_kept(tmp_path: Path) -> None:
    left, young = (tmp_path / f"{'a' * 40}.writing-{name}" for name in ("left", "young"))
    for folder in (left, young):
        folder.mkdir()
        (folder / "token_ids").write_bytes(b"1234")
    before = time.time() - cache.WRITING_S - 60
    for path in (left / "token_ids", left, young):
        os.utime(path, (before, before))
    cache.prune(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_reading_an_entry_keeps_it_and_writing_one_removes_the_old(
    rows: Path, tmp_path: Path, chatml: ChatTemplate
) -> None:
    folder = tmp_path / "cache"
    remembered = cached_loader(load_demonstrations, folder, SETTINGS)
    remembered(rows, chatml)
    (used,) = folder.iterdir()
    before = time.time() - 40 * DAY
    os.utime(used / "demonstrations.json", (before, before))
    remembered(rows, chatml)
    old = make_entry(folder, "b", 40)
    other = Path(shutil.copy(rows, tmp_path / "other.jsonl"))
    remembered(other, chatml)
    assert used.is_dir()
    assert not old.exists()
    assert len(list(folder.iterdir())) == 2


def test_bad_data_is_refused_as_without_a_cache(tmp_path: Path, chatml: ChatTemplate) -> None:
    with pytest.raises(DataError, match="no such file"):
        cached_loader(load_demonstrations, tmp_path, SETTINGS)(tmp_path / "none.jsonl", chatml)


def test_small_data_and_a_view_of_the_data_do_not_read_the_cache(
    rows: Path, tmp_path: Path, chatml: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Counting()
    cached_loader(load, tmp_path / "cache", SETTINGS)(rows, chatml)
    cached_loader(load, tmp_path / "cache", SETTINGS, read=False)(rows, chatml)
    assert load.calls == 2
    monkeypatch.setattr(cache, "CACHED_FROM_BYTES", 1 << 20)
    cached_loader(load, tmp_path / "other", SETTINGS)(rows, chatml)
    assert not (tmp_path / "other").exists()
