"""What a result was made from, and whether a run of today would be made from the same.

A setting that is newer than a result must have its default. So a result stays valid when the program gets new settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.config_io import plain_settings

from .plan import POLICY, WORLD

Origin = Mapping[str, Any]


def origin_of(stages: Sequence[RunConfig]) -> Origin:
    """Everything that decides what a job learns: settings, base policy and data, without paths and addresses."""
    digest = hashlib.sha256((WORLD / POLICY / "model.safetensors").read_bytes())
    for path in (path for run in stages for path in _data_files(run)):
        digest.update(path.read_bytes())
    return {"inputs": digest.hexdigest(), "settings": [_settings(run) for run in stages]}


def is_same(kept: Origin, stages: Sequence[RunConfig]) -> bool:
    """Whether a result with this origin is one of these runs."""
    now = origin_of(stages)
    return (
        kept["inputs"] == now["inputs"]
        and len(kept["settings"]) == len(stages)
        and all(
            _agree(run, settings, before)
            for run, settings, before in zip(stages, now["settings"], kept["settings"], strict=True)
        )
    )


def _settings(run: RunConfig) -> dict[str, Any]:
    settings = plain_settings(run)
    del settings["output"], settings["rollout"]["servers"]
    return _without_folders(settings)


def _agree(block: Any, now: Any, before: Any) -> bool:
    """Compare the plain settings of a block with older ones, which may lack settings."""
    if not dataclasses.is_dataclass(block) or not isinstance(before, Mapping):
        return now == before
    fields = {field.name: field for field in dataclasses.fields(block) if field.name in now}
    return before.keys() <= fields.keys() and all(
        _agree(getattr(block, name), now[name], before[name])
        if name in before
        else getattr(block, name) == _default(field)
        for name, field in fields.items()
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _data_files(run: RunConfig) -> list[Path]:
    sources = (*run.data.prompts, *(run.data.demonstrations or ()), *(run.data.evaluation or ()))
    return [path for source in sources for path in source.path]


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value
