"""Finds the policy to evaluate: a Hugging Face folder, or a checkpoint, which is first converted to one.

``python -m megatron_chord.evaluation.policy CHECKPOINT FOLDER`` converts in a separate process without GPUs, because
Megatron-Core would otherwise put the whole model on one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.convert.sources import checkpoint_of
from megatron_chord.data.templates import ToolsAs
from megatron_chord.runtime.megatron import hide_warnings
from megatron_chord.weights.torch_dist import METADATA

_CONVERTED = ".converted"
"""Folder of the converted checkpoint. No run has a folder of this name, so it may be deleted."""
_SOURCE = "source.json"
"""File in that folder that names the checkpoint it was made of. It is written last, so a folder without it is not
complete."""
_DIGEST = "policy.json"
_RECORDS = ("latest", "latest_checkpointed_iteration.txt")
"""A folder with one of these files means the newest checkpoint in it."""
_HASHED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model")
_PIECE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Policy:
    folder: Path
    """Hugging Face folder."""
    source: Path
    """The path that the user gave."""
    digest: str
    """Digest of the weights, the configuration and the tokenizer."""
    chat_template: Path | None = None
    """The chat template of the checkpoint's run, if the run set one."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """``data.template_arguments`` of that run. The template of an exported policy has them as defaults."""
    tools_as: ToolsAs = "auto"
    """``data.tools_as`` of that run, or of the run that exported the policy."""

    @property
    def was_converted(self) -> bool:
        return self.folder != self.source


def label_of(path: Path) -> str:
    """A short name: ``runs/x/checkpoints/step-000100`` is x-step-000100, ``runs/x/policy`` is x-policy."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.name}"
    return f"{path.parent.name}-{path.name}" if path.name in ("policy", "checkpoints") else path.name


def run_folder(source: Path) -> Path | None:
    """The run's folder of ``RUN/policy``, ``RUN/checkpoints`` or ``RUN/checkpoints/step-N``; otherwise None."""
    source = source.resolve()
    run = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    lies_so = source.parent.name == "checkpoints" or source.name in ("policy", "checkpoints")
    return run if lies_so and (run / "config.yaml").is_file() else None


def default_output(source: Path, suite_name: str) -> Path:
    """``evaluations/SUITE/POLICY`` in the folder of the policy's run, whose report shows it.

    It is in the current folder if the policy belongs to no run, or if the run's folder belongs to another user.
    """
    run = run_folder(source)
    base = run if run is not None and os.access(run, os.W_OK) else Path()
    return base / "evaluations" / suite_name / label_of(source)


def open_policy(source: Path, output: Path, say: Callable[[str], None]) -> Policy:
    """The policy at ``source``. A checkpoint is converted to ``output/.converted`` if that was not done before.

    Raises:
        ValueError: it is not a Hugging Face folder or a checkpoint, or it cannot be converted.
    """
    folder = hf_folder(source, output / _CONVERTED, say)
    run = None if folder == source else run_of(source)
    digest = _digest(folder, output / _DIGEST, say)
    if run is None:
        return Policy(folder=folder, source=source, digest=digest, tools_as=_tools_as_of_export(source, say))
    return Policy(
        folder=folder,
        source=source,
        digest=digest,
        chat_template=run.data.chat_template,
        template_arguments=run.data.template_arguments,
        tools_as=run.data.tools_as,
    )


def hf_folder(source: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Return ``source`` if it is a Hugging Face folder. Otherwise convert the checkpoint to ``target`` and return that.

    Raises:
        ValueError: it is neither kind of folder, or it cannot be converted.
    """
    if not source.is_dir():
        raise ValueError(
            f"{source}: no such folder; POLICY is a Hugging Face folder or a run's checkpoints/step-N"
        )
    if (source / "config.json").is_file():
        return source
    if not any((source / name).is_file() for name in (METADATA, *_RECORDS)):
        of_run = [str(source / name) for name in ("policy", "checkpoints") if (source / name).is_dir()]
        if (source / "config.yaml").is_file() and of_run:
            raise ValueError(f"{source} is the folder of a run: give {' or '.join(of_run)}")
        raise ValueError(
            f"{source} is neither a Hugging Face folder (it has no config.json) nor a checkpoint (no {METADATA})"
        )
    _convert_if_new(source, target, say)
    return target


def run_of(source: Path) -> RunConfig | None:
    """The settings of the run that wrote this checkpoint or exported policy; None if no run did."""
    for folder in (source.resolve().parent, source.resolve().parent.parent):
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml")
    return None


def _tools_as_of_export(source: Path, say: Callable[[str], None]) -> ToolsAs:
    """``data.tools_as`` of the run in whose folder the policy is. No file of the policy itself has this setting."""
    run = run_folder(source)
    if run is None:
        return "auto"
    try:
        return load_config(run / "config.yaml").data.tools_as
    except ConfigError as error:
        say(
            f"{error}\ndata.tools_as of that run is not known: auto is used (set tools_as of the suite to change it)"
        )
        return "auto"


def _convert_if_new(source: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Convert unless ``folder`` was made of the same checkpoint: same path, and same sizes and times of its files."""
    checkpoint = checkpoint_of(source).resolve()
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    stamps = [
        [str(path.relative_to(checkpoint)), path.stat().st_size, path.stat().st_mtime_ns] for path in files
    ]
    made_of = json.dumps({"path": str(checkpoint), "files": stamps}) + "\n"
    record = folder / _SOURCE
    if record.is_file() and record.read_text(encoding="utf-8") == made_of:
        return
    if folder.is_dir():
        say(f"{folder} is incomplete or belongs to another checkpoint: it is made again")
        shutil.rmtree(folder)
    say(f"converting {source}")
    _convert(source, folder)
    record.write_text(made_of, encoding="utf-8")


def _convert(source: Path, target: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_chord.evaluation.policy", str(source), str(target)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"{source} cannot be converted: {done.stderr.strip()[-2000:]}")


def _digest(folder: Path, record: Path, say: Callable[[str], None]) -> str:
    """Digest of the contents of the folder's files. Files with the size and time in ``record`` are not read again."""
    files = sorted(
        [*folder.glob("*.safetensors"), *(folder / name for name in _HASHED if (folder / name).is_file())]
    )
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    known = json.loads(record.read_text()) if record.is_file() else {}
    if known.get("files") == stamps and known.get("folder") == str(folder.resolve()):
        return known["digest"]
    size = sum(path.stat().st_size for path in files)
    if size > 1 << 30:
        say(f"reading {size / 1e9:.0f} GB of weights, to check which kept answers belong to this policy")
    with ThreadPoolExecutor(min(8, len(files) or 1)) as pool:
        parts = list(pool.map(_file_digest, files))
    named = [f"{path.name} {part}" for path, part in zip(files, parts, strict=True)]
    digest = hashlib.blake2b("\n".join(named).encode(), digest_size=16).hexdigest()
    record.write_text(json.dumps({"folder": str(folder.resolve()), "digest": digest, "files": stamps}) + "\n")
    return digest


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def main() -> int:
    hide_warnings()
    from megatron_chord.convert.directions import to_hf
    from megatron_chord.convert.sources import open_source
    from megatron_chord.runtime import parallel as runtime

    source, target = map(Path, sys.argv[1:])
    try:
        to_hf(open_source(source), target, notify=print)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        runtime.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
