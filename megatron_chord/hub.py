"""Names on the Hugging Face hub. They are looked up in the local cache, and downloaded before a run if that is allowed.

A model is ``OWNER/NAME``. A data set is ``hf://datasets/OWNER/NAME/PATH``; the path may be a pattern. ``@REVISION`` may
follow the name of either. Nothing is downloaded in a Slurm job, by a rank, or with ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]
_REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?")
_UNRESOLVED = re.compile(r"hf:/+(?P<kind>models|datasets)/(?P<name>.*)")
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files of a model that are downloaded. Pickles are not among them."""
_DATA_FILE = re.compile(r".*\.(parquet|jsonl|ndjson|json|csv|arrow)(\.gz|\.zst)?")
"""Endings of the files that `data.rows` reads."""
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<start>.*)-(?P<number>\d+)-of-(?P<total>\d+)(?P<end>\..*)?")
"""Names such as train-00000-of-00010.parquet."""


@dataclass(frozen=True)
class HubName:
    kind: Kind
    repo: str
    revision: str = "main"
    inside: str = ""
    """For a data set: the path or pattern in its repository."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision != "main" else ""
        inside = f"/{self.inside}" if self.inside else ""
        return f"{'hf://datasets/' if self.kind == 'dataset' else ''}{self.repo}{revision}{inside}"

    @property
    def unresolved(self) -> Path:
        """The path that a run's settings hold for a name that is not in the cache."""
        return Path(f"hf:/{self.kind}s") / str(self).removeprefix("hf://datasets/")

    @property
    def command(self) -> str:
        """The command with which a user downloads the name by hand."""
        parts = ["hf", "download", self.repo]
        if self.kind == "dataset":
            parts += ["--repo-type", "dataset"]
        if self.revision != "main":
            parts += ["--revision", self.revision]
        if self.inside:
            parts += ["--include", f"'{self.inside}'"]
        return " ".join(parts)


def read_name(text: str, kind: Kind) -> HubName | None:
    """Read ``text`` as a name on the hub. Return None if it is a path."""
    if kind == "dataset":
        start = re.match(r"hf:/+datasets/", text)
        if start is None:
            return None
        text = text[start.end() :]
    match = _REPO.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    if rest and (kind == "model" or not rest.startswith("/")):
        return None
    return HubName(kind, match["repo"], match["revision"] or "main", rest.strip("/"))


def unresolved_name(path: Path) -> HubName | None:
    """Return the name whose placeholder (``HubName.unresolved``) is ``path``. Return None for any other path."""
    match = _UNRESOLVED.fullmatch(str(path))
    if match is None:
        return None
    if match["kind"] == "models":
        return read_name(match["name"], "model")
    return read_name(f"hf://datasets/{match['name']}", "dataset")


def repository_name(path: Path) -> str | None:
    """Return NAME if ``path`` belongs to the data set OWNER/NAME of the hub, downloaded or not. Otherwise return
    None."""
    name = unresolved_name(path)
    if name is not None:
        return name.repo.partition("/")[2]
    for folder, below in itertools.pairwise(path.parts):
        if below == "snapshots" and folder.startswith("datasets--"):
            return folder.rpartition("--")[2]
    return None


def resolve(text: str, kind: Kind, local: Path) -> Path:
    """The path that ``text`` means: ``local`` if ``text`` is a path or a model folder ``local`` exists, otherwise the
    path in the cache, or ``HubName.unresolved`` if it is not there.

    Raises:
        ValueError: the data set has several files, and ``text`` does not say which.
    """
    name = read_name(text, kind)
    if name is None or (kind == "model" and local.exists()):
        return local
    return cached(name) or name.unresolved


def cached(name: HubName, env: Mapping[str, str] = os.environ) -> Path | None:
    """The model's folder, or the data set's file or pattern, in the local cache. None if a part of it is missing there.

    Raises:
        ValueError: the data set has several files, and the name does not say which.
    """
    repository = cache_folder(env) / f"{name.kind}s--{name.repo.replace('/', '--')}"
    reference = repository / "refs" / name.revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else name.revision
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        return None
    if name.kind == "model":
        return snapshot if _is_whole_model(snapshot) else None
    listed = _listed_files(name, snapshot, env)
    if name.inside:
        found = list(snapshot.glob(name.inside))
        files = [file for path in found for file in (path.iterdir() if path.is_dir() else (path,))]
        pattern = "*" if any(path.is_dir() for path in found) else Path(name.inside).name
        is_whole = all(file.exists() for file in listed) and _has_all_shards(files, pattern)
        return snapshot / name.inside if found and is_whole else None
    present = (file for file in snapshot.rglob("*") if _DATA_FILE.fullmatch(file.name) and file.is_file())
    files = sorted({*present, *listed})
    if len(files) > 1:
        shown = ", ".join(str(file.relative_to(snapshot)) for file in files[:5])
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        raise ValueError(f"{name} has several files; choose some of them with {name}/PATH: {shown}{more}")
    return files[0] if files and files[0].exists() and _has_all_shards(files, "*") else None


def _listed_files(name: HubName, snapshot: Path, env: Mapping[str, str]) -> list[Path]:
    """Return the paths that the data files of the repository of ``name`` have in the cache.

    huggingface_hub keeps a list of the repository's files when it downloads a pattern. Without that list the result is
    empty.
    """
    if not (snapshot.parents[1] / "trees").is_dir():
        return []
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        files = get_cached_repo_tree(
            name.repo, repo_type=name.kind, revision=snapshot.name, cache_dir=cache_folder(env)
        )
    except CachedRepoTreeNotFoundError:
        return []
    paths = (file.path for file in files if _DATA_FILE.fullmatch(Path(file.path).name))
    return [snapshot / path for path in paths if not name.inside or _is_meant(path, name.inside)]


def _is_meant(path: str, inside: str) -> bool:
    """Return whether ``inside`` matches a file of a repository, or the folder in which the file lies."""
    parts, patterns = path.split("/"), inside.split("/")
    return len(parts) - len(patterns) in (0, 1) and all(map(fnmatch, parts, patterns))


def _is_whole_model(snapshot: Path) -> bool:
    """Return whether the folder has a config and all weight files that its index, or the names of the others,
    require."""
    weights = list(snapshot.glob("*.safetensors"))
    if not weights or not (snapshot / "config.json").exists():
        return False
    if not (snapshot / _INDEX).exists():
        return _has_all_shards(weights, "*")
    named = json.loads((snapshot / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return all((snapshot / file).exists() for file in set(named))


def _has_all_shards(files: Sequence[Path], pattern: str) -> bool:
    """Return whether all shards are there: for each file such as ``NAME-1-of-4``, the others that match the pattern.

    Numbers may begin at 0 or at 1.
    """
    present = {file for file in files if file.exists()}
    for file in present:
        shard = _SHARD.fullmatch(file.name)
        if shard is None:
            continue
        width, total = len(shard["number"]), int(shard["total"])
        beside = [
            file.with_name(f"{shard['start']}-{number:0{width}}-of-{shard['total']}{shard['end'] or ''}")
            for number in range(total + 1)
        ]
        first = 1 if beside[-1] in present else 0
        wanted = [other for other in beside[first : first + total] if fnmatch(other.name, pattern)]
        if not present.issuperset(wanted):
            return False
    return True


def cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Return the folder where huggingface_hub keeps its downloads."""
    if folder := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    if folder := env.get("HF_HOME"):
        return Path(folder).expanduser() / "hub"
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def why_offline(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the reason why nothing may be downloaded here. Return None if downloads are allowed."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if env.get(name, "").lower() in ("1", "true", "yes", "on"):
            return f"{name} is set"
    if "SLURM_JOB_ID" in env:
        return "a Slurm job downloads nothing"
    return "ranks download nothing" if "RANK" in env else None


def refusal(name: HubName, reason: str) -> str:
    """Return the error message for a name that is not in the cache and cannot be downloaded."""
    return (
        f"{name} is not a path and is not completely in the Hugging Face cache {cache_folder()}, and {reason}. "
        f"Download it first: {name.command}"
    )


def fetch(name: HubName, say: Callable[[str], None]) -> None:
    """Download ``name`` into the cache.

    Raises:
        ValueError: downloads are not allowed, or this one failed. The message has the command for a download by hand.
    """
    reason = why_offline()
    if reason is not None:
        raise ValueError(refusal(name, reason))
    from huggingface_hub import snapshot_download

    say(f"downloading {name} into {cache_folder()}")
    inside = name.inside
    patterns: list[str] | None = [inside, f"{inside}/*"] if inside else None
    if name.kind == "model":
        patterns = list(_MODEL_FILES)
    try:
        snapshot_download(
            name.repo,
            repo_type=name.kind,
            revision=name.revision,
            allow_patterns=patterns,
            cache_dir=cache_folder(),
        )
    except Exception as error:  # any error of the network, the hub or the disk
        text = str(error).strip().splitlines()
        raise ValueError(
            refusal(name, f"the download failed: {text[0] if text else type(error).__name__}")
        ) from error
    if cached(name) is None:
        raise ValueError(refusal(name, "the repository has no such files"))
