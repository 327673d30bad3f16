"""The kinds of reward. A new kind is one file in ``rewards/kinds`` and one entry here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megatron_chord.rewards.kinds.base import RewardKind, WholeReward
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward

RewardConfig = MathReward | ExactReward | ToolCallsReward | FunctionReward
"""The block ``reward``. Its ``kind`` chooses one of these; the first is the default."""

KINDS: dict[str, type[RewardKind]] = {member.kind: member for member in get_args(RewardConfig)}


def to_json(reward: RewardKind) -> dict[str, Any]:
    """What a grader process must know of a reward."""
    others = {field.name for field in dataclasses.fields(WholeReward)}
    values = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward)}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if name not in others
    }


def from_json(settings: Mapping[str, Any]) -> RewardKind:
    """The reward that ``to_json`` wrote, without the settings of the whole."""
    kind = KINDS[settings["kind"]]
    hints = get_type_hints(kind)

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if hints[name] is Path else value

    return kind(**{name: typed(name, value) for name, value in settings.items()})
