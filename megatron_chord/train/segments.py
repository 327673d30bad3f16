"""The settings of a run's segments. Each start of a run begins a segment, so a resumed run has several.

``config.yaml`` has the settings of the newest segment. If there is more than one, ``configs/`` has those of all
segments, each in a file that is named after the segment's first step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chord.files import write_whole
from megatron_chord.report.folder import CONFIG, read_settings
from megatron_chord.settings_tree import are_blocks, setting

SEGMENTS = "configs"
_SAME_LEARNING = (
    "output",
    "parallel",
    "model.recompute",
    "data.prompts.path",  # the cursors check the content of the files
    "data.demonstrations.path",
    "data.evaluation",
    "data.cache",
    "batch.max_tokens_per_gpu",
    "rollout.servers",
    "rollout.tensor",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_bytes",
    "rollout.transport",
    "rollout.sleep",
    "rollout.offload",
    "rollout.restarts",
    "rollout.max_logprob_gap",
    "rollout.max_probability_error",
    "reward.workers",
    "reward.timeout_s",
    "reward.memory_mb",
    "reward.max_error_rate",
    "reward.batch_size",
    "reward.concurrency",
    "reward.environment",
    "optim.skip_nonfinite",
    "evaluation",
    "checkpoint",
    "timeouts",
    "watchdog",
    "tracking",
    "trace_steps",
)
"""Settings and blocks that change where and how a run computes or what it reports, but not what is learned."""


@dataclass(frozen=True, kw_only=True)
class Change:
    name: str
    before: Any
    after: Any
    matters: bool
    """True if it changes what is learned."""

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.before)} -> {_shown(self.after)}"


def horizon(settings: Mapping[str, Any]) -> int | None:
    """The step at which the learning rate reaches ``optim.min_lr``; None if it is constant."""
    if setting(settings, "optim.schedule", "constant") == "constant":
        return None
    return setting(settings, "optim.decay_steps", None) or setting(settings, "steps", None)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The differences between two trees of settings. Settings that exist in only one of them are ignored."""
    return [
        Change(name=name, before=old, after=new, matters=_matters(name, before, after))
        for name, old, new in _differences(before, after)
    ]


def check_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, allowed: bool, remarks: Sequence[str] = ()
) -> list[str]:
    """Lines for the user about the differences from the segment that is continued; empty if there are none.

    ``remarks``: further lines about these differences.

    Raises:
        ValueError: a difference changes what is learned, and is not ``allowed``.
    """
    found = changes(before, after)
    serious = [change for change in found if change.matters]
    if serious and not allowed:
        listed = "\n".join(f"  {change}" for change in serious)
        raise ValueError(
            "settings that change what is learned differ from those of the run that is resumed:\n"
            + "\n".join(
                [listed, *remarks, "Use the settings of the run, or allow the change with --allow-changed"]
            )
        )
    lines = [
        f"resumed with another {change}{' (changes what is learned)' if change.matters else ''}"
        for change in found
    ]
    return [*lines, *remarks]


def settings_before(folder: Path, step: int) -> dict[str, Any]:
    """The settings with which the run in ``folder`` did training step ``step`` - 1; empty if there is no such file.

    Raises:
        ValueError: the file cannot be read, or is not a YAML mapping.
    """
    segments = [path for first, path in _segments(folder) if first < step]
    return read_settings(segments[-1] if segments else folder / CONFIG)


def write_settings(folder: Path, text: str, *, first_step: int) -> None:
    """Start a segment at ``first_step``. Segments that started there or later are removed, because their steps are
    repeated."""
    current, kept = folder / CONFIG, folder / SEGMENTS
    if first_step == 0:
        shutil.rmtree(kept, ignore_errors=True)
    else:
        kept.mkdir(exist_ok=True)
        for first, path in _segments(folder):
            if first >= first_step:
                path.unlink()
        if not _segments(folder) and current.is_file():
            (kept / _name(0)).write_text(current.read_text(encoding="utf-8"), encoding="utf-8")
        (kept / _name(first_step)).write_text(text, encoding="utf-8")
    # A process that is killed here must not leave half a file: a resumed run reads it.
    write_whole(current, text)


def _segments(folder: Path) -> list[tuple[int, Path]]:
    """(first step, file) of each segment, in order."""
    found = (folder / SEGMENTS).glob("step-*.yaml")
    return sorted((int(path.stem.removeprefix("step-")), path) for path in found)


def _name(step: int) -> str:
    return f"step-{step:06d}.yaml"


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in before:
        if name not in after or before[name] == after[name]:
            continue
        old, new = before[name], after[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{above}{name}.")
        elif are_blocks(old) and are_blocks(new) and len(old) == len(new):
            for number, (one, other) in enumerate(zip(old, new, strict=True)):
                yield from _differences(one, other, f"{above}{name}[{number}].")
        else:
            yield f"{above}{name}", old, new


def _matters(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if name in ("steps", "optim.decay_steps"):
        return horizon(after) not in (None, horizon(before))
    name = re.sub(r"\[\d+\]", "", name).replace("reward.terms.", "reward.")
    return not any(name == same or name.startswith(f"{same}.") for same in _SAME_LEARNING)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
