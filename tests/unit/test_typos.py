"""A misspelt setting of any block is refused with file, line and the right name."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.config_methods import TokenWeight
from megatron_chord.config_nodes import setting_names
from megatron_chord.schedules import MuSchedule
from tests.support.ranks import ROOT

EXAMPLE = ROOT / "examples" / "arithmetic" / "chord_phi.yaml"
UNIONS: dict[str, tuple[str, Any]] = {
    "method": ("name", typing.get_type_hints(RunConfig)["method"]),
    "method.mu": ("schedule", MuSchedule),
    "method.token_weight": ("kind", TokenWeight),
    "reward": ("kind", typing.get_type_hints(RunConfig)["reward"]),
}
"""Blocks that have several forms: the setting that chooses the form, and the forms."""


def misspelt(name: str) -> str:
    """Return ``name`` with its second and third letter exchanged. A short name gets one more letter."""
    if len(name) < 4 or name[1] == name[2]:
        return f"{name}x"
    return name[0] + name[2] + name[1] + name[3:]


def plain_blocks() -> Iterator[tuple[str, str, str]]:
    """Return (block, no choice of form, name of a setting in it) of the blocks with one form."""
    for path in setting_names(RunConfig):
        block, _, name = path.rpartition(".")
        if not any(f"{path}.".startswith(f"{union}.") for union in UNIONS):
            yield block, "", name


def forms() -> Iterator[tuple[str, str, str]]:
    """Return (block, choice of its form, name of a setting in it) of the blocks with several forms."""
    for block, (key, union) in UNIONS.items():
        for form in typing.get_args(union):
            hint = typing.get_type_hints(form)[key]
            for choice, field in itertools.product(typing.get_args(hint), dataclasses.fields(form)):
                if field.name != key:
                    yield block, f"{key}: {choice}", field.name


def test_every_misspelt_setting_is_refused_with_line_and_name(tmp_path: Path) -> None:
    file, failures, blocks = tmp_path / "run.yaml", list[str](), set[str]()
    for block, choice, name in [*plain_blocks(), *forms()]:
        parts = block.split(".") if block else []
        blocks.add(block)
        lines = [f"base: {EXAMPLE}", *(f"{'  ' * depth}{part}:" for depth, part in enumerate(parts))]
        indent = "  " * len(parts)
        lines += [f"{indent}{choice}"] if choice else []
        lines += [f"{indent}{misspelt(name)}: 1"]
        file.write_text("\n".join(lines))
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_config(file)
        said = str(caught.value)
        wanted = f"{file}:{len(lines)}: unknown setting '{'.'.join([*parts, misspelt(name)])}'"
        if not said.startswith(wanted) or f"did you mean {'.'.join([*parts, name])}" not in said:
            failures.append(f"{block} {choice} {name}: {said}")
    assert not failures, "\n".join(failures)
    assert {"", "data", "optim", "parallel", "rollout", "method", "method.mu", "reward", "watchdog"} <= blocks
