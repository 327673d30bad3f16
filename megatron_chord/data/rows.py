"""Reads the rows of a data file with their places, and reports all faults of the file in one error.

A data set is read to its end before anything is refused, so that the user can correct all faults at once. Nothing is
guessed: an ambiguous row is a fault. JSON lines and Parquet give the same rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
from rich.progress import Progress

from megatron_chord.data.cores import on_all_cores
from megatron_chord.data.files import files_of, kind_of, opened, why_no_data

T = TypeVar("T")

QUESTION_FIELDS = ("messages", "problem", "question", "prompt")
TOOL_FIELDS = ("tools", "functions")
TRUTH_FIELDS = ("answer", "truth", "ground_truth")
MAX_TEXT = 4_000_000
"""Maximum number of characters of one text. Longer texts are refused before they are tokenised."""
MAX_ROW_BYTES = 64 << 20
"""Maximum number of bytes of one row. Longer rows are not parsed."""
MAX_SHOWN = 20
MAX_SAME = 5
"""Largest number of rows with the same fault that are listed separately; more are summarised in one line."""
PROGRESS_FROM_ROWS = 5000
MAX_ARRAY_BYTES = 2 << 30
"""Size limit of a JSON array, which is parsed as a whole."""
_UNREADABLE = "the rows after it cannot be read"
_BATCH_ROWS = 16
"""Number of rows of a Parquet file that are decoded at a time. A few bytes may decode to many copies of a long text."""


class RowError(ValueError):
    """A fault of one row. `parse_rows` adds the place."""


class FatalRowError(RowError):
    """A `RowError` that the following rows would have, too. They are not read."""


class WrittenNumber(float):
    """A number with a point or an exponent in a JSON file. It also keeps its text."""

    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number


class DataError(ValueError):
    """A data file that cannot be used, with up to `MAX_SHOWN` of its faults."""


@dataclass(frozen=True)
class Row:
    position: str
    """``file:line`` of JSON lines, ``file:row N`` of Parquet; both count from 1."""
    number: int
    fields: dict[str, Any]
    """The row's fields without those that are null: null and absent mean the same."""
    file: str = ""
    """Name of the row's file; its path, where several files have this name."""
    has_nulls: bool = False
    """True if null keys were removed from nested columns. Arrow gives every object of a column the keys of all."""
    given: Mapping[str, Any] | None = None
    """All fields as they are in the file, if ``fields`` were changed since."""


@dataclass(frozen=True)
class Fault:
    position: str
    reason: str
    number: int = 0
    """Number of the row in its file, from 1; 0 if the row has none."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Counts of a file's rows that were used and left out; ``str()`` is the line for the log."""

    data: str
    """The path that was read, or the first of several."""
    num_rows: int
    num_kept: int
    num_overlong: int
    reading: str = ""
    """How the rows were read, and which of their fields were not used."""
    tools_shown: frozenset[str] = frozenset()
    """Where functions and calls are written: by the chat template or in the system message."""
    dropped: tuple[Fault, ...] = ()
    """Rows that cannot be used and were left out (``data.max_dropped``)."""
    overlong: tuple[Fault, ...] = ()
    """Rows that are beyond a limit and were left out."""

    def __str__(self) -> str:
        left_out = f", {self.num_overlong} left out as over-long" if self.num_overlong else ""
        if self.dropped:
            first = self.dropped[0]
            left_out += (
                f", {len(self.dropped)} left out as faulty (the first: {first.position}: {first.reason})"
            )
        reading = f"; {self.reading}" if self.reading else ""
        return f"{self.data}: {self.num_kept} of {self.num_rows} rows{left_out}{reading}"


def read_rows(path: Path) -> list[Row]:
    """All rows of a data set. Raises DataError with the list of their faults."""
    return parse_rows(path, lambda row: row)


def parse_rows(
    data: Path | Sequence[Path],
    parse: Callable[[Row], Any],
    *,
    spread: Callable[[Any], Any] = lambda parsed: parsed,
    keep: Callable[[Any], T] = lambda spread: spread,
    max_dropped: float = 0.0,
    dropped: list[Fault] | None = None,
) -> list[T]:
    """The results ``keep(spread(parse(row)))`` of all rows, in order. A row that cannot be read, or for which one of
    the three functions raises RowError, is a fault. Faults are collected.

    Args:
        data: a path, or several that are one data set.
        parse: called with the rows in order.
        spread: called on all cores at once.
        keep: called with the results in the rows' order.
        max_dropped: share of all rows that may be faulty. They are left out, and added to ``dropped``.

    Raises:
        DataError: more rows are faulty; the message has ``position: reason`` of each. Or the file cannot be read.
    """
    name = called(data)
    try:
        files = [file for path in _paths(data) for file in files_of(path, tuple(_READERS))]
    except ValueError as error:
        raise DataError(str(error)) from None
    for file in files:
        _refuse_other(file)
    has_twins = len({file.name for file in files}) < len(files)
    readers = [(file, *_READERS[kind_of(file)]) for file in files]
    parsed: list[T] = []
    faults: list[Fault] = []
    rows = itertools.chain.from_iterable(
        _of_file(read(file), file, str(file) if has_twins else file.name) for file, _, read in readers
    )
    total = sum(count(file) for file, count, _ in readers)
    shown = _with_progress(rows, description=f"reading {Path(name).name}", total=total)
    for row, result in on_all_cores(shown, partial(_attempt, parse), spread):
        try:
            parsed.append(keep(result()))
        except RowError as error:
            faults.append(Fault(row.position, str(error), row.number))
            if isinstance(error, FatalRowError):
                raise DataError(_listing(name, faults)) from None
    if len(faults) > max_dropped * (len(parsed) + len(faults)):
        allowed = f"; data.max_dropped allows {max_dropped:g} of all rows" if max_dropped else ""
        raise DataError(_listing(name, faults) + allowed)
    if dropped is not None:
        dropped += faults
    if not parsed:
        raise DataError(f"{name}: holds no rows")
    return parsed


def _refuse_other(file: Path) -> None:
    try:
        reason = why_no_data(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if reason is not None:
        raise DataError(f"{file}: {reason}")


def called(data: Path | Sequence[Path]) -> str:
    """A data set's path, or the first of its paths, for messages."""
    first, *others = _paths(data)
    return f"{first} and {len(others)} more" if others else str(first)


def _paths(data: Path | Sequence[Path]) -> Sequence[Path]:
    return (data,) if isinstance(data, Path) else data


def only_one_of(row: Row, names: Iterable[str]) -> str:
    """The one field of `names` that the row has. It is a fault if it has none or several of them."""
    names = tuple(names)
    present = [name for name in names if name in row.fields]
    if len(present) == 1:
        return present[0]
    listed = ", ".join(f"`{name}`" for name in present or names)
    if present:
        raise RowError(f"has {listed}, which mean the same: keep one")
    raise RowError(f"field missing or null: {listed}" if len(names) == 1 else f"has none of {listed}")


def text_field(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        hint = "; a chat goes under `messages`" if isinstance(value, list) else ""
        raise RowError(f"`{name}` must be a string, got {kind_name(value)}{hint}")
    return checked_text(value, f"`{name}`")


def json_field(row: Row, name: str) -> Any:
    """A value that is given directly or as its JSON text."""
    value = row.fields[name]
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except RowError as error:
        raise RowError(f"`{name}`: {error}") from None


def truth_field(row: Row) -> str:
    """`answer` or `truth`: a string, or a number as it is written."""
    name = only_one_of(row, ("answer", "truth"))
    value = row.fields[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"`{name}` is {value}")
        return value.text if isinstance(value, WrittenNumber) else str(value)
    if not isinstance(value, str):
        raise RowError(f"`{name}` must be a string or a number, got {kind_name(value)}")
    return checked_text(value, f"`{name}`")


def row_id(row: Row, seen: dict[str, str]) -> str:
    """The row's own `id`, or ``file:number``. `seen` maps all ids so far to their rows; the id is added to it."""
    value = row.fields.get("id", f"{row.file}:{row.number}")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RowError(f"`id` must be a string or a whole number, got {kind_name(value)}")
    if str(value) in seen:
        raise RowError(f"`id` {value!r} is taken by {seen[str(value)]}")
    seen[str(value)] = row.position
    return checked_text(str(value), "`id`")


def checked_text(value: str, name: str) -> str:
    """Return ``value``. Raises RowError if it is empty, too long, or not valid Unicode."""
    if len(value) > MAX_TEXT:
        raise RowError(f"{name} has {len(value)} characters, at most {MAX_TEXT} are read")
    if not value.strip():
        raise RowError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} has an unpaired surrogate at character {error.start}") from None
    return value


def kind_name(value: Any) -> str:
    """A description of the value's type, for errors."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    names[WrittenNumber] = "float"
    return "nothing" if value in ([], "") else names.get(type(value), type(value).__name__)


def _listing(data: str, faults: list[Fault]) -> str:
    counts = Counter(fault.reason for fault in faults)
    by_line: dict[str, list[Fault]] = {}
    for fault in faults:
        line = fault.reason if counts[fault.reason] > MAX_SAME else fault.position
        by_line.setdefault(line, []).append(fault)
    shown = list(by_line.values())[:MAX_SHOWN]
    lines = [
        f"{same[0].position}{f' and {len(same) - 1} more rows' if len(same) > 1 else ''}: {same[0].reason}"
        for same in shown
    ]
    if len(by_line) > MAX_SHOWN:
        lines.append(f"... and {len(faults) - sum(map(len, shown))} more")
    rows = "row" if len(faults) == 1 else "rows"
    return "\n".join([f"{data}: {len(faults)} {rows} cannot be used", *lines])


def _with_progress(rows: Iterator[Row | Fault], *, description: str, total: int) -> Iterator[Row | Fault]:
    console = Console(stderr=True)
    if total < PROGRESS_FROM_ROWS or not console.is_terminal:
        yield from rows
        return
    with Progress(console=console, transient=True) as progress:
        yield from progress.track(rows, total=total, description=description)


def _attempt(parse: Callable[[Row], Any], row: Row | Fault) -> tuple[Row | Fault, Any]:
    """The row, and the result of ``parse`` or the RowError that it raised."""
    if isinstance(row, Fault):
        return row, RowError(row.reason)
    try:
        return row, parse(row)
    except RowError as error:
        return row, error


def _of_file(rows: Iterator[Row | Fault], file: Path, name: str) -> Iterator[Row | Fault]:
    try:
        for row in rows:
            yield replace(row, file=name) if isinstance(row, Row) else row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read or unpacked: {error}") from error


def _count_lines(path: Path) -> int:
    """0 for a compressed file, because it would have to be unpacked first."""
    if path.suffix in (".gz", ".zst"):
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in _bounded_lines(file))


def _read_lines(path: Path) -> Iterator[Row | Fault]:
    # Lines are split as bytes: str.splitlines would also split at U+2028 inside a string.
    with opened(path) as file:
        for number, line in enumerate(_bounded_lines(file), start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            position = f"{path}:{number}"
            if len(line) > MAX_ROW_BYTES:
                yield Fault(position, f"the line is longer than {MAX_ROW_BYTES} bytes", number)
                continue
            try:
                yield Row(position, number, _json_object(line.rstrip(b"\r\n")))
            except RowError as error:
                yield Fault(position, str(error), number)


def _read_json(path: Path) -> Iterator[Row | Fault]:
    """A JSON array of objects, or lines of JSON under the same suffix."""
    with opened(path) as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith((b"{\n", b"{\r")):
        raise DataError(
            f"{path}: expected an array of objects, or an object on each line; this is one object"
        )
    if not start.startswith(b"["):
        yield from _read_lines(path)
        return
    with opened(path) as file:
        data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise DataError(f"{path}: a JSON array of more than {MAX_ARRAY_BYTES} bytes; write it as JSON lines")
    try:
        items = strict_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    except RowError as error:
        raise DataError(f"{path}: {error}") from None
    for number, item in enumerate(items, start=1):
        position = f"{path}:item {number}"
        if isinstance(item, dict):
            yield Row(position, number, {name: value for name, value in item.items() if value is not None})
        else:
            yield Fault(position, f"expected a JSON object, got {kind_name(item)}", number)


def _read_csv(path: Path) -> Iterator[Row | Fault]:
    """Every value is text, as it is written; an empty one counts as absent. The first line names the columns.

    Raises:
        DataError: the CSV is broken or not UTF-8. No row after that place can be read, so this is not a fault of one
            row.
    """
    csv.field_size_limit(MAX_TEXT)
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        number = 0
        try:
            if len(set(names := reader.fieldnames or ())) < len(names):
                raise DataError(f"{path}: a column is given twice: {', '.join(names)}")
            for number, fields in enumerate(reader, start=1):
                position = f"{path}:{reader.line_num}"
                if None in fields or None in fields.values():
                    yield Fault(
                        position, f"has another number of values than the {len(names)} columns", number
                    )
                else:
                    yield Row(position, number, {name: value for name, value in fields.items() if value})
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}; {_UNREADABLE}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:row {number + 1}: not UTF-8: {error.reason}; {_UNREADABLE}") from None


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The file's lines. Of a line longer than ``MAX_ROW_BYTES`` only the first ``MAX_ROW_BYTES`` + 1 bytes."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while len(rest) == MAX_ROW_BYTES + 1 and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW_BYTES + 1)
        yield line


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = strict_json(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    if not isinstance(value, dict):
        raise RowError(f"expected a JSON object, got {kind_name(value)}")
    return {name: item for name, item in value.items() if item is not None}


def strict_json(text: str) -> Any:
    """JSON without duplicate names and without NaN. Numbers keep their text. Raises RowError for anything else."""
    try:
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=WrittenNumber,
        )
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("JSON nested too deeply") from None
    except RowError:
        raise
    except ValueError as error:  # a whole number of more digits than Python converts
        raise RowError(f"broken JSON: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RowError(f"field given twice: {', '.join(f'`{name}`' for name in twice)}")
    return fields


def _refuse_constant(name: str) -> None:
    raise RowError(f"{name} is not JSON")


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet  # here: JSON lines need no Arrow

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{path}: column given twice: {', '.join(twice)}")
    return file


def _count_parquet(path: Path) -> int:
    with _parquet_file(path) as file:
        return file.metadata.num_rows


def _read_parquet(path: Path) -> Iterator[Row | Fault]:
    import pyarrow

    with _parquet_file(path) as file:
        columns = _text_columns(file.schema_arrow)
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
        try:
            yield from _arrow_rows(path, batches, json_columns=_json_columns(file.schema_arrow))
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: broken Parquet: {error}; {_UNREADABLE}") from error


def _read_arrow(path: Path) -> Iterator[Row | Fault]:
    """A file of a folder that ``datasets.Dataset.save_to_disk`` wrote: a stream of Arrow record batches."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            columns = _text_columns(stream.schema)
            batches = (batch.select(columns) for batch in stream)
            yield from _arrow_rows(path, batches, json_columns=_json_columns(stream.schema))
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not an Arrow stream: {error}") from error


def _arrow_rows(path: Path, batches: Iterable[Any], *, json_columns: frozenset[str]) -> Iterator[Row | Fault]:
    """The rows without null keys in nested columns, because Arrow gives each object of a column the keys of all others.

    An intended null, in the arguments of a call, cannot be distinguished from these. In JSON text it is kept.
    """
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            number += 1
            part = batch.slice(row, 1)
            if part.nbytes > MAX_ROW_BYTES:
                yield Fault(f"{path}:row {number}", f"the row is longer than {MAX_ROW_BYTES} bytes", number)
                continue
            (fields,) = part.to_pylist()
            position = f"{path}:row {number}"
            try:
                for name in json_columns:
                    fields[name] = fields[name] and [strict_json(item) for item in fields[name]]
            except RowError as error:
                yield Fault(position, str(error), number)
                continue
            pairs = {name: _without_nulls(item) for name, item in fields.items() if item is not None}
            has_nulls = any(found for _, found in pairs.values())
            yield Row(
                position, number, {name: item for name, (item, _) in pairs.items()}, has_nulls=has_nulls
            )


def _text_columns(schema: Any) -> list[str]:
    """All columns except those of raw bytes, such as images. Nothing here reads these."""
    import pyarrow.types

    is_bytes = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_fixed_size_binary)
    return [column.name for column in schema if not any(test(column.type) for test in is_bytes)]


def _without_nulls(value: Any) -> tuple[Any, bool]:
    """``value`` without object keys whose value is null, and whether there were any. Elements of lists are kept."""
    if isinstance(value, list):
        pairs = [_without_nulls(item) for item in value]
        return [item for item, _ in pairs], any(found for _, found in pairs)
    if not isinstance(value, dict):
        return value, False
    kept = {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return {key: item for key, (item, _) in kept.items()}, len(kept) < len(value) or any(
        found for _, found in kept.values()
    )


def _json_columns(schema: Any) -> frozenset[str]:
    """Columns that are lists of JSON texts by their Arrow type, as ``datasets`` writes with ``Json()``."""
    return frozenset(
        column.name
        for column in schema
        if getattr(getattr(column.type, "value_type", None), "extension_name", "") == "arrow.json"
    )


_READERS: dict[str, tuple[Callable[[Path], int], Callable[[Path], Iterator[Row | Fault]]]] = {
    ".jsonl": (_count_lines, _read_lines),
    ".ndjson": (_count_lines, _read_lines),
    ".json": (lambda path: 0, _read_json),
    ".csv": (lambda path: 0, _read_csv),
    ".parquet": (_count_parquet, _read_parquet),
    ".arrow": (lambda path: 0, _read_arrow),
}
KINDS = tuple(_READERS)
"""Suffixes of the files that can be read."""
