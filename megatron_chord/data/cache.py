"""A cache of tokenised demonstrations. A run that starts again maps them from files into memory within seconds.

An entry is a folder that is named by a hash of all that the demonstrations depend on: the bytes of the data files, the
template, the tokenizer, the settings, this project's code for data and rewards, and the versions of the libraries. So
an entry is never out of date, and is never changed. It holds

    demonstrations.json  their ids, sources and numbers of tokens, and the report of the reading
    token_ids            int32, one demonstration after another
    trainable            bool, the same

Each writer fills a folder of its own and then renames it. If several processes write the same entry, only the first
rename succeeds. Nothing is pickled. After it has written, it removes old entries (``prune``). The time of an entry's
``demonstrations.json`` is that of its last use.
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
"""Smaller data sets are not cached, because reading them takes only a second or two."""
KEPT_BYTES = 50 << 30
"""Size limit of all entries in a folder. Above it, those that were not used for the longest time are removed."""
UNUSED_DAYS = 30.0
"""An entry that was not used for this long is removed."""
IN_USE_DAYS = 7.0
"""An entry that was used within this time is kept, even above the size limit: a run may have it mapped into memory."""
WRITING_S = 3600.0
"""An unfinished folder in which nothing was written for this long was left by a killed process, and is removed."""
_CONTENT = "demonstrations.json"
_OURS = re.compile(r"[0-9a-f]{40}(?P<unfinished>\.writing-.*)?")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "pyarrow")


def cached_loader(
    load: Callable[..., Loaded], folder: Path, settings: Mapping[str, Any], *, read: bool = True
) -> Callable[..., Loaded]:
    """Return a function like ``load`` (``load_demonstrations``) that uses the cache. If there is no cached result, it
    calls ``load`` and caches the result.

    Errors of the cache in ``folder`` are ignored: the data are then loaded, or not cached.

    Args:
        settings: keyword arguments of ``load``, plain JSON. The returned function takes further arguments.
        read: if False, entries are written but not read.
    """

    def load_cached(data: Path | Sequence[Path], template: ChatTemplate, **more: Any) -> Loaded:
        files = _files(data)
        if sum(file.stat().st_size for file in files) < CACHED_FROM_BYTES:
            return load(data, template, **settings, **more)
        entry = folder / _key(files, template, {"data": str(data), **settings, **more})
        found = read_entry(entry) if read else None
        if found is None:
            found = load(data, template, **settings, **more)
            with contextlib.suppress(OSError):  # a full disk does not stop the run
                write_entry(entry, *found)
                found = read_entry(entry) or found
                prune(folder)
        else:
            with contextlib.suppress(OSError):  # the cache may be read-only
                (entry / _CONTENT).touch()
        return found

    return load_cached


def write_entry(entry: Path, demonstrations: Sequence[Demonstration], report: LoadReport) -> None:
    """Write a complete entry, unless a readable one exists already.

    Raises:
        OSError: an error of the file system; no file is left behind.
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
    """Read an entry; None if there is no complete one. The tokens stay in the mapped files."""
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
    """Remove old entries, the oldest entries above the size limit, and unfinished folders of killed processes.

    Other files are not touched. Errors are ignored, for example if another process removes the same entry.
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
    """The data files of the sources. Empty if the paths are faulty; ``load`` then reports the fault."""
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
