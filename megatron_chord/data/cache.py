"""Tokenised demonstrations kept in files, so that a run that starts again maps them into memory in seconds.

An entry is a folder that is named by a hash of all that the demonstrations depend on: the bytes of the data files, the
template, the tokenizer, the settings, this project's code for data and rewards, and the versions of the libraries. So
an entry is never out of date, and is never changed. It holds

    demonstrations.json  their ids, sources and numbers of tokens, and the report of the reading
    token_ids            int32, one demonstration after another
    trainable            bool, the same

A writer fills a folder of its own and renames it, which succeeds for one of several. Nothing is pickled. After it has
written, it removes old entries (``prune``). The time of an entry's ``demonstrations.json`` is that of its last use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chord.data.files import files_of
from megatron_chord.data.rows import KINDS, Fault, LoadReport
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Compact, Demonstration

Loaded = tuple[list[Demonstration], LoadReport]

CACHED_FROM_BYTES = 8 << 20
"""Smaller data sets are read again each time, which takes a second or two."""
KEPT_BYTES = 50 << 30
"""Of all entries in a folder. Beyond it, those that were not used for the longest time are removed."""
UNUSED_DAYS = 30.0
"""An entry that was not used for so long is removed."""
IN_USE_DAYS = 7.0
"""An entry that was used within this time is kept, whatever the size: a run may have it mapped into memory."""
WRITING_S = 3600.0
"""A writer's folder in which nothing was written for so long is what a killed process left."""
_CONTENT = "demonstrations.json"
_OURS = re.compile(r"[0-9a-f]{40}(?P<unfinished>\.writing-.*)?")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "pyarrow")


def remembering(
    load: Callable[..., Loaded], folder: Path, settings: Mapping[str, Any], *, read: bool = True
) -> Callable[..., Loaded]:
    """``load`` (``load_demonstrations``) with ``settings`` that first looks into ``folder`` and leaves an entry there.

    What cannot be read there is loaded, and what cannot be written is left out.

    Args:
        settings: keyword arguments of ``load``, plain JSON; the function that is returned takes further ones.
        read: False writes entries, and reads none.
    """

    def remembered(data: Path | Sequence[Path], template: ChatTemplate, **more: Any) -> Loaded:
        files = _files(data)
        if sum(file.stat().st_size for file in files) < CACHED_FROM_BYTES:
            return load(data, template, **settings, **more)
        entry = folder / _key(files, template, {"data": str(data), **settings, **more})
        found = read_entry(entry) if read else None
        if found is None:
            found = load(data, template, **settings, **more)
            with contextlib.suppress(OSError):  # a full disk is no reason not to train
                write_entry(entry, *found)
                found = read_entry(entry) or found
                prune(folder)
        else:
            with contextlib.suppress(OSError):  # a cache that may only be read
                (entry / _CONTENT).touch()
        return found

    return remembered


def write_entry(entry: Path, demonstrations: Sequence[Demonstration], report: LoadReport) -> None:
    """Write a whole entry, or nothing where one that can be read is there.

    Raises:
        OSError: the file system's; nothing is left behind.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f"{entry.name}.writing-", dir=entry.parent))
    try:
        for name, kind in (("token_ids", np.int32), ("trainable", np.bool_)):
            with (own / name).open("wb") as file:
                for one in demonstrations:
                    file.write(np.asarray(getattr(one, name), kind).tobytes())
                _to_disk(file)
        content = {
            "ids": [one.id for one in demonstrations],
            "sources": [one.source for one in demonstrations],
            "lengths": [len(one.token_ids) for one in demonstrations],
            "report": dataclasses.asdict(report) | {"tools_shown": sorted(report.tools_shown)},
        }
        with (own / _CONTENT).open("w", encoding="utf-8") as file:
            json.dump(content, file)
            _to_disk(file)
        if entry.exists() and read_entry(entry) is None:
            shutil.rmtree(entry, ignore_errors=True)
        with contextlib.suppress(FileExistsError):
            own.rename(entry)
    except OSError as error:
        if not entry.is_dir():  # ENOTEMPTY: another writer was first
            raise error
    finally:
        shutil.rmtree(own, ignore_errors=True)


def read_entry(entry: Path) -> Loaded | None:
    """None where there is no whole entry. The tokens stay in the mapped files."""
    try:
        content = json.loads((entry / _CONTENT).read_text(encoding="utf-8"))
        ends = np.cumsum(content["lengths"]).tolist()
        token_ids = np.asarray(np.memmap(entry / "token_ids", np.int32, "r"))
        trainable = np.asarray(np.memmap(entry / "trainable", np.bool_, "r"))
        if len(token_ids) != ends[-1] or len(trainable) != ends[-1]:
            return None
        demonstrations = [
            Demonstration(
                id=identity,
                token_ids=Compact(token_ids[start:end], np.int32),
                trainable=Compact(trainable[start:end], np.bool_),
                source=source,
            )
            for identity, source, start, end in zip(
                content["ids"], content["sources"], [0, *ends[:-1]], ends, strict=True
            )
        ]
        report = content["report"]
        faults: dict[str, Any] = {
            name: tuple(Fault(**fault) for fault in report.pop(name)) for name in ("dropped", "overlong")
        }
        shown = frozenset(report.pop("tools_shown"))
        return demonstrations, LoadReport(**report, **faults, tools_shown=shown)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def prune(folder: Path) -> None:
    """Remove entries that are old or too many, and what killed writers left. Other files are not touched.

    What another process removes at the same time, or what may not be removed, is passed over.
    """
    now = time.time()
    entries: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        ours = _OURS.fullmatch(path.name)
        if ours is None or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            files = [file.stat() for file in (path, *path.iterdir())]
            if not ours["unfinished"]:
                used = (path / _CONTENT).stat().st_mtime
                entries.append((used, sum(file.st_size for file in files), path))
            elif now - max(file.st_mtime for file in files) > WRITING_S:
                shutil.rmtree(path, ignore_errors=True)
    total = 0
    for used, size, path in sorted(entries, reverse=True):
        total += size
        days = (now - used) / 86400
        if days > UNUSED_DAYS or (days > IN_USE_DAYS and total > KEPT_BYTES):
            shutil.rmtree(path, ignore_errors=True)


def _files(data: Path | Sequence[Path]) -> list[Path]:
    """No files where they will not do: ``load`` says why."""
    paths = [data] if isinstance(data, Path) else data
    try:
        return [file for path in paths for file in files_of(path, KINDS)]
    except ValueError:
        return []


def _key(files: Sequence[Path], template: ChatTemplate, settings: Mapping[str, Any]) -> str:
    package = Path(__file__).parents[1]
    code = sorted([*(package / "data").glob("*.py"), *(package / "rewards").rglob("*.py")])
    parts = [
        json.dumps(settings, sort_keys=True, default=str),
        template.fingerprint(),
        *(f"{library} {version(library)}" for library in _LIBRARIES),
        *(f"{file.name} {_hash(file)}" for file in code),
        *(f"{file} {_hash(file)}" for file in files),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
