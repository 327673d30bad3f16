"""Finds the files that a path in ``data`` means, and opens them."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
"""Suffixes of compressed files, and their first bytes."""
_OTHER_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer; fetch the data with `git lfs pull`"),
    (_PACKED[".gz"], "is compressed with gzip, so its name must end in .gz"),
    (_PACKED[".zst"], "is compressed with zstd, so its name must end in .zst"),
    (b"PK\x03\x04", "is a ZIP archive; unpack it"),
    (b"\xff\xfe", "is UTF-16; write it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; write it as UTF-8"),
    (b"<!doctype html", "is a web page"),
    (b"<html", "is a web page"),
)
"""First bytes of files that are not data, in upper or lower case, and the reason for the error message."""


def kind_of(file: Path) -> str:
    """The suffix of the file's format, without the suffix of its compression."""
    return Path(file.stem).suffix if file.suffix in _PACKED else file.suffix


def files_of(path: Path, kinds: tuple[str, ...]) -> list[Path]:
    """The files of ``path``: the file itself, the files of a folder, or those that match a pattern.

    The files of a folder or of a pattern are ordered by name and have the same kind.

    Raises:
        ValueError: there is no file, no file of ``kinds``, or there are files of several kinds.
    """
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(
            file for file in path.iterdir() if kind_of(file) in kinds and not _is_description(file)
        )
        if not found:
            inside = ", ".join(sorted(file.name for file in path.iterdir() if file.is_dir())[:5])
            hint = f"; its subfolders are not searched ({inside}): name one" if inside else ""
            raise ValueError(f"{path}: the folder holds no file ending in {' or '.join(kinds)}{hint}")
    else:
        found = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(str(path)) else []
        if not found:
            raise ValueError(f"{path}: no such file")
    present = sorted({kind_of(file) for file in found})
    if len(present) > 1:
        raise ValueError(
            f"{path}: holds files of several kinds, {' and '.join(present)}: name one, as in *{present[0]}"
        )
    if present[0] not in kinds:
        raise ValueError(
            f"{path}: expected a file ending in {' or '.join(kinds)}, optionally followed by .gz or .zst"
        )
    return found


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed if its name ends in .gz or .zst."""
    if file.suffix == ".gz":
        with gzip.open(file, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif file.suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(file), compression="zstd") as stream:
            yield io.BufferedReader(_Unpacked(stream))
    else:
        with file.open("rb") as stream:
            yield stream


def why_no_data(file: Path) -> str | None:
    """Compare the first bytes of a file with the format that its name says.

    Returns:
        What the file is instead, for an error message. None if the bytes do not show another format.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        start = stream.read(32).lower()
    for first, reason in _OTHER_STARTS:
        if start.startswith(first.lower()) and first != _PACKED.get(file.suffix):
            return reason
    return None


class _Unpacked(io.RawIOBase):
    """Adapts an Arrow stream, which has no lines, to Python's buffered reader."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _is_description(file: Path) -> bool:
    """True if ``datasets`` or the hub writes a file with this name next to the data."""
    return file.name in ("dataset_info.json", "state.json", "dataset_infos.json", "dataset_dict.json")
