from __future__ import annotations

import ast
import typing
from pathlib import Path
from typing import Any

import pytest

import megatron_chord.rewards.kinds
from megatron_chord.rewards.kinds.base import RewardKind
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.table import KINDS, TermConfig, from_json, to_json

FOLDER = Path(megatron_chord.rewards.kinds.__file__).parent


def test_every_file_of_a_kind_has_its_entry() -> None:
    """A kind that has a file but no entry could not be chosen in YAML."""
    written = {
        node.name
        for file in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(getattr(base, "id", "") == "RewardKind" for base in node.bases)
    }
    assert {kind.__name__ for kind in typing.get_args(TermConfig)} >= written


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.EXAMPLE is not None])
def test_the_example_is_right_and_an_answer(kind: type[RewardKind]) -> None:
    reward = kind()
    assert reward.EXAMPLE is not None
    assert reward.load()(reward.EXAMPLE) == 1.0
    assert reward.has_answer(reward.EXAMPLE.text)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_reaches_its_worker_as_it_is(name: str) -> None:
    reward = sample_of(KINDS[name])
    assert from_json(to_json(reward)) == reward


def sample_of(kind: type[RewardKind]) -> RewardKind:
    """Return a sample of a kind, with settings of its own where the kind requires some."""
    own: dict[str, Any] = {}
    if kind is FunctionReward:
        own = {"path": Path("my.py"), "name": "score", "allow": ("network", "files"), "batch_size": 4}
    return kind(workers=3, timeout_s=1.5, format="chord", **own)
