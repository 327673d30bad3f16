"""The same three rows are read from every container that users have. A path that cannot be read is an error that says
why."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from megatron_chord.data.rows import DataError, parse_rows, read_rows

ROWS = [
    {"problem": "6*7?", "answer": "42"},
    {"problem": 'say "a,b"\n', "answer": "1.0"},
    {"problem": "ü", "answer": "007"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=2).encode()


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


def zst(path: Path) -> None:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(LINES)


def as_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["problem", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def shards(path: Path) -> None:
    path.mkdir()
    for index, row in enumerate(ROWS):
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path / f"train-{index}-of-3.parquet")
    (path / "README.md").write_text("a dataset card")
    (path / "dataset_infos.json").write_text("{}")


def saved(path: Path) -> None:
    """Save the rows as ``datasets.Dataset.save_to_disk`` does."""
    path.mkdir()
    table = pa.Table.from_pylist(ROWS)
    with (
        pa.OSFile(str(path / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (path / "state.json").write_text("{}")
    (path / "dataset_info.json").write_text("{}")


CONTAINERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.ndjson": lambda path: path.write_bytes(LINES),
    "lines.json": lambda path: path.write_bytes(LINES),
    "array.json": lambda path: path.write_bytes(ARRAY),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + ARRAY),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(ARRAY)),
    "rows.jsonl.zst": zst,
    "rows.csv": as_csv,
    "rows.parquet": parquet,
    "shards": shards,
    "saved": saved,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    CONTAINERS[name](tmp_path / name)
    assert [row.fields for row in read_rows(tmp_path / name)] == ROWS


def test_a_pattern_names_some_files_of_a_folder(tmp_path: Path) -> None:
    shards(tmp_path / "hub")
    rows = read_rows(tmp_path / "hub" / "train-[01]-*.parquet")
    assert [row.fields for row in rows] == ROWS[:2]
    assert [row.file for row in rows] == ["train-0-of-3.parquet", "train-1-of-3.parquet"]


@pytest.mark.parametrize(
    ("files", "path", "reason"),
    [
        ({}, "rows.jsonl", "no such file"),
        ({}, "train-*.parquet", "no such file"),
        ({"rows.xlsx": b""}, "rows.xlsx", "expected a file ending in .*csv"),
        ({"d/card.md": b""}, "d", "the folder holds no file ending in"),
        (
            {"d/a.csv": b"", "d/b.jsonl": b""},
            "d",
            r"several kinds, \.csv and \.jsonl: name one, as in \*\.csv",
        ),
        ({"a.jsonl.gz": b"no gzip"}, "a.jsonl.gz", "cannot be read or unpacked"),
        ({"a.jsonl.gz": gzip.compress(LINES)[:-9]}, "a.jsonl.gz", "cannot be read or unpacked"),
        ({"a.json": b'[{"a": 1}, 3]'}, "a.json", "a.json:item 2: expected a JSON object"),
        ({"a.json": b'[{"a": 1}'}, "a.json", "a.json: broken JSON"),
        ({"a.csv": b"a,a\n1,2\n"}, "a.csv", "a column is given twice"),
        ({"a.csv": b"a,b\n1,2,3\n"}, "a.csv", "a.csv:2: has another number of values than the 2 columns"),
        ({"a.csv": b'a,b\n"1"2,3\n'}, "a.csv", "broken CSV"),
        ({"a.arrow": b"no arrow"}, "a.arrow", "not an Arrow stream"),
        ({"d/train/a.jsonl": LINES}, "d", r"holds no file ending in .*not searched \(train\): name one"),
        ({"a.parquet": b"version https://git-lfs.github.com/spec/v1\n"}, "a.parquet", "Git LFS pointer"),
        ({"a.jsonl.gz": b"version https://git-lfs.github.com/spec/v1\n"}, "a.jsonl.gz", "Git LFS pointer"),
        ({"a.jsonl": gzip.compress(LINES)}, "a.jsonl", r"compressed with gzip, so its name must end in \.gz"),
        ({"a.zst": b"", "a.csv": b"\x28\xb5\x2f\xfd"}, "a.csv", r"its name must end in \.zst"),
        ({"a.jsonl": b"PK\x03\x04..."}, "a.jsonl", "is a ZIP archive"),
        ({"a.jsonl": LINES.decode().encode("utf-16")}, "a.jsonl", "a.jsonl: is UTF-16; write it as UTF-8"),
        ({"a.csv": "\ufeffa,b\n".encode("utf-16-be")}, "a.csv", "is UTF-16"),
        ({"a.jsonl": b"<!DOCTYPE html>\n"}, "a.jsonl", "is a web page"),
        ({"a.json": b'{\n  "a": 1\n}\n'}, "a.json", "an object on each line; this is one object"),
        ({"d/a.jsonl/x": b""}, "d", "cannot be read: Is a directory"),
    ],
)
def test_a_path_that_will_not_do_is_refused_with_its_reason(
    files: dict[str, bytes], path: str, reason: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_rows(tmp_path / path)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(b'"1"2,3', r"a\.csv:\d+: broken CSV"), (b"\xff,3", r"a\.csv:row \d+: not UTF-8")],
)
def test_the_rest_of_a_csv_is_never_lost_as_one_faulty_row(bad: bytes, reason: str, tmp_path: Path) -> None:
    good = b"1,2\n" * 3
    (tmp_path / "a.csv").write_bytes(b"a,b\n" + good + bad + b"\n" + good)
    with pytest.raises(DataError, match=f"{reason}.*the rows after it cannot be read"):
        parse_rows(tmp_path / "a.csv", lambda row: row, max_dropped=0.5)


@pytest.mark.parametrize("place", [4, 18])
def test_a_broken_page_of_a_parquet_file_is_no_traceback(place: int, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet(file)
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF  # a byte of the first page's header
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: (broken Parquet|cannot be read or unpacked)"):
        read_rows(file)
