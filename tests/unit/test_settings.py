"""`megatron-chord settings` and docs/settings.md describe every setting."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

import pytest

from megatron_chord import peers, settings
from megatron_chord.config import OptimConfig, RunConfig
from megatron_chord.config_methods import MethodConfig
from megatron_chord.config_nodes import choice, is_list, members, setting_names
from megatron_chord.config_suite import SuiteConfig
from megatron_chord.schedules import MuSchedule
from tests.support.ranks import ROOT

LISTING = list(settings.lines())


def blocks(kind: type) -> Iterator[type]:
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for member in members(hint):
            yield from blocks(member)


def keys(kind: type, naming: str = "") -> Iterator[str]:
    """Return the settings that the listing of a block must have, in order. ``naming`` is the key that comes first.

    If several lists have the same blocks, only the first one lists their settings.
    """
    hints, told = typing.get_type_hints(kind), set()
    for field in sorted(dataclasses.fields(kind), key=lambda field: field.name != naming):
        yield field.name
        inner = members(hints[field.name])
        if is_list(hints[field.name]):
            inner = [member for member in inner if member not in told]
            told |= set(inner)
        for member in inner:
            yield from keys(member, choice(hints[field.name]) or "")


def under(start: str, indent: int) -> list[str]:
    """Return the lines of a block, from its first line to the next line with less indentation."""
    lines = LISTING[LISTING.index(start) + 1 :]
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" " * indent)), len(lines))
    return [line.strip() for line in lines[:end]]


def test_every_field_of_every_block_is_listed_in_order() -> None:
    listed = [line.strip() for line in LISTING if line and not line.strip().startswith("#")]
    assert [line.partition(":")[0] for line in listed] == ["base", *keys(RunConfig)]


def test_the_settings_of_a_suite_are_listed() -> None:
    listed = [
        line.strip() for line in settings.lines(SuiteConfig) if line and not line.strip().startswith("#")
    ]
    assert [line.partition(":")[0] for line in listed] == ["base", *keys(SuiteConfig)]


@pytest.mark.parametrize("kind", list(blocks(RunConfig)), ids=lambda kind: kind.__name__)
def test_every_doc_of_a_block_is_listed(kind: type) -> None:
    text = " ".join(line.strip().removeprefix("# ") for line in LISTING)
    assert set(settings._field_docs(kind)) <= {field.name for field in dataclasses.fields(kind)}
    for doc in settings._field_docs(kind).values():
        assert doc in text
    assert kind is RunConfig or settings._doc(kind) in text


def test_the_alternatives_of_a_union_stand_in_a_row_each_with_its_own_settings() -> None:
    start = next(line for line in LISTING if line.startswith("  mu:"))
    assert (
        start
        == "  mu:  # one of these blocks; default: constant; a value in place of the block is its schedule"
    )
    text = "\n".join(line for line in under(start, 4) if not line.startswith("#"))
    listed = [block.splitlines() for block in text.split("\n\n")]
    for member, lines in zip(typing.get_args(MuSchedule), listed, strict=True):
        names = [line.partition(":")[0] for line in lines]
        assert names[0] == "schedule"
        assert names == list(keys(member, "schedule"))
    assert "schedule: constant\npeak: 0.1  # float" in text
    assert "schedule: binary\nswitch_step:  # int\nreset_optimizer: false  # bool" in text


def test_a_private_base_lends_its_docs_and_field_docs() -> None:
    text = "\n".join(LISTING)
    assert (
        "# mu rises linearly from 0 to `peak`, falls to `valley` and stays there. The fall is a straight"
        in text
    )
    listed = sum(line.strip().startswith("first_step:") for line in LISTING)
    assert text.count("# Number that the schedule gives to the run's first step") == listed > 0
    assert "Base of the schedules" not in text


def test_optional_blocks_shorthands_and_free_settings_are_told() -> None:
    assert "  kl: null  # or this block" in LISTING
    assert "    coefficient: 0.001  # float" in LISTING
    assert "    kind: one | p | phi" in LISTING
    start = "method:  # one of these blocks; default: chord; a value in place of the block is its name"
    lines = under(start, 2)
    assert {f"name: {kind.name}" for kind in typing.get_args(MethodConfig)} <= set(lines)
    at = lines.index("name: luffy")
    assert [line for line in lines[at:] if not line.startswith("#")][:3] == [
        "name: luffy",
        "gamma: 0.1  # float",
        "shaping: true  # bool",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "base:  # path, may be left out",
        "output:  # path",
        "seed: 0  # int",
        "  dtype: bf16  # fp32 | bf16",
        "  megatron_overrides: {}  # name: int | float | bool | text",
        "  servers: []  # list of text",
        "  answer_marker: '####'  # text",
        "  distributed_optimizer: true  # bool",
        "  lr: 1.0e-06  # float",
        "  chat_template: null  # path",
        "  prompts:  # a path, a list of paths, a block or a list of blocks, each with",
        "    path:  # list of path",
        "  demonstrations: null  # a path, a list of paths, a block or a list of blocks, as prompts",
    ],
)
def test_defaults_are_written_as_in_yaml(line: str) -> None:
    assert line in LISTING


def test_lines_fit() -> None:
    assert max(map(len, LISTING)) <= 110


def test_the_page_is_what_the_dataclasses_say() -> None:
    """If this fails after a change: megatron-chord settings --markdown > docs/settings.md."""
    assert (ROOT / "docs" / "settings.md").read_text() == settings.markdown()


def test_the_page_has_a_row_for_every_setting() -> None:
    rows = {line.split("`")[1] for line in settings.markdown().splitlines() if line.startswith("| `")}
    named = {name for name in setting_names(RunConfig) if name.rpartition(".")[2] not in ("schedule", "kind")}
    as_prompts = ("data.demonstrations.", "data.evaluation.")
    assert {name for name in named - rows if not name.startswith(as_prompts)} <= {"method.name"}
    assert (
        "## `data.prompts`, and the same in `data.demonstrations` and `data.evaluation`"
        in settings.markdown()
    )
    assert "optim.schedule" in rows


def test_names_elsewhere_are_of_settings_that_exist() -> None:
    assert set(peers.NAMES) <= setting_names(RunConfig)


@pytest.mark.parametrize("kind", list(blocks(RunConfig)), ids=lambda kind: kind.__name__)
def test_every_setting_has_a_meaning(kind: type) -> None:
    hints, docs = typing.get_type_hints(kind), settings._field_docs(kind)
    named = {"name", "schedule", "kind"} if kind is not OptimConfig else set()
    plain = {field.name for field in dataclasses.fields(kind) if not members(hints[field.name])}
    assert plain - named - set(docs) == set()
