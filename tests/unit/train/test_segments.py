"""What a resumed run prints about changed settings, and the record of them in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config, plain_settings
from megatron_chord.config_nodes import setting_names
from megatron_chord.train import segments
from megatron_chord.train.segments import check_changes, settings_before, write_settings
from tests.support.ranks import ROOT

EXAMPLE = ROOT / "examples" / "arithmetic" / "chord_phi.yaml"
PROMPTS = EXAMPLE.with_name("problems_train.jsonl")


def given(*overrides: str) -> dict[str, Any]:
    return plain_settings(load_config(EXAMPLE, overrides))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=1e-6", "optim.lr: 0.0005 -> 1e-06"),
        ("method.mu.peak=0.1", "method.mu.peak: 0.5 -> 0.1"),
        ("method=luffy", "method.name: chord -> luffy"),
        (
            "objective.kl={}",
            'objective.kl: null -> {"estimator": "k3", "coefficient": 0.001, "reference": null}',
        ),
        ("rollout.temperature=0.7", "rollout.temperature: 1.0 -> 0.7"),
        ("seed=1", "seed: 0 -> 1"),
        ("data.prompts={path: a.jsonl, weight: 2}", "data.prompts[0].weight: 1.0 -> 2.0"),
        ("data.prompts=[{path: a.jsonl}, {path: b.jsonl}]", "data.prompts: "),
    ],
)
def test_what_changes_learning_needs_to_be_allowed(override: str, line: str) -> None:
    with pytest.raises(ValueError, match="--allow-changed") as refused:
        check_changes(given(), given(override, "checkpoint.every=5"), allowed=False)
    assert line in str(refused.value).splitlines()[1].strip()
    assert "checkpoint" not in str(refused.value)
    lines = check_changes(given(), given(override), allowed=True)
    assert any(told.startswith(f"resumed with another {line}") for told in lines)
    assert sum(told.endswith("(changes what is learned)") for told in lines) == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("checkpoint.every=5", "checkpoint.every: 0 -> 5"),
        ("steps=99", "steps: 60 -> 99"),
        ("data.prompts=/elsewhere.jsonl", f'data.prompts[0].path: ["{PROMPTS}"] -> ["/elsewhere.jsonl"]'),
        ("parallel.ranks=2", "parallel.ranks: 1 -> 2"),
        ("evaluation.problems=5", "evaluation.problems: 200 -> 5"),
        ("rollout.servers=[http://127.0.0.1:8000]", 'rollout.servers: [] -> ["http://127.0.0.1:8000"]'),
    ],
)
def test_what_does_not_change_learning_is_only_told(override: str, line: str) -> None:
    assert check_changes(given(), given(override), allowed=False) == [f"resumed with another {line}"]


def test_more_steps_change_a_rate_that_falls_towards_the_end() -> None:
    with pytest.raises(ValueError, match="steps: 60 -> 99"):
        check_changes(
            given("optim.schedule=cosine"), given("optim.schedule=cosine", "steps=99"), allowed=False
        )


def test_more_steps_do_not_change_a_rate_with_a_horizon_of_its_own() -> None:
    before = given("optim.schedule=cosine")
    kept = given("optim.schedule=cosine", "optim.min_lr=1e-6", "steps=99", "optim.decay_steps=60")
    before["optim"]["min_lr"] = 1e-6
    assert check_changes(before, kept, allowed=False) == [
        "resumed with another steps: 60 -> 99",
        "resumed with another optim.decay_steps: null -> 60",
    ]
    with pytest.raises(ValueError, match="decay_steps: 60 -> 99"):
        check_changes(kept, given("optim.schedule=cosine", "steps=99", "optim.decay_steps=99"), allowed=False)


def test_a_refusal_ends_with_the_remarks() -> None:
    with pytest.raises(ValueError, match="seed: 0 -> 1\nabout the rate\nUse"):
        check_changes(given(), given("seed=1"), allowed=False, remarks=["about the rate"])
    assert (
        check_changes(given(), given("seed=1"), allowed=True, remarks=["about the rate"])[-1]
        == "about the rate"
    )


def test_the_same_settings_say_nothing() -> None:
    assert check_changes(given(), given(), allowed=False) == []
    assert check_changes({}, given(), allowed=False) == []  # the saved settings are unknown


def test_a_setting_that_only_one_version_knows_is_no_change() -> None:
    older = given()
    del older["checkpoint"]["every_minutes"]
    assert check_changes(older | {"no_longer": 1}, given(), allowed=False) == []


def test_the_table_names_settings_that_there_are() -> None:
    names = setting_names(RunConfig)
    blocks = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(segments._SAME_LEARNING) <= set(names) | blocks


def test_each_segment_keeps_its_settings(tmp_path: Path) -> None:
    def start(lr: float, first_step: int) -> None:
        write_settings(tmp_path, yaml.safe_dump({"lr": lr}), first_step=first_step)

    def kept() -> dict[str, float]:
        return {
            path.name: yaml.safe_load(path.read_text())["lr"]
            for path in sorted((tmp_path / "configs").glob("*"))
        }

    start(1.0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert settings_before(tmp_path, 40) == {"lr": 1.0}
    start(2.0, 40)
    start(3.0, 60)
    assert kept() == {"step-000000.yaml": 1.0, "step-000040.yaml": 2.0, "step-000060.yaml": 3.0}
    assert settings_before(tmp_path, 40) == {"lr": 1.0}
    assert settings_before(tmp_path, 41) == {"lr": 2.0}
    assert settings_before(tmp_path, 99) == {"lr": 3.0}
    start(4.0, 50)  # an earlier checkpoint: the segment from step 60 on is dropped
    assert kept() == {"step-000000.yaml": 1.0, "step-000040.yaml": 2.0, "step-000050.yaml": 4.0}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 4.0}
    start(5.0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["a: [", "- a", "", "a: \udcff"])
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    assert settings_before(tmp_path, 1) == {}
    (tmp_path / "config.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"config\.yaml: (cannot be read|expected a mapping)"):
        settings_before(tmp_path, 1)
    write_settings(tmp_path, "a: 1", first_step=0)
    assert settings_before(tmp_path, 1) == {"a": 1}


def test_terms_of_a_reward_are_compared_one_by_one() -> None:
    before = given("reward=[{kind: exact, workers: 2}, {kind: math, weight: 0.5}]")
    other_workers = given("reward=[{kind: exact, workers: 8}, {kind: math, weight: 0.5}]")
    assert check_changes(before, other_workers, allowed=False) == [
        "resumed with another reward.terms[0].workers: 2 -> 8"
    ]
    other_weight = given("reward=[{kind: exact, workers: 2}, {kind: math, weight: 0.1}]")
    with pytest.raises(ValueError, match=r"reward\.terms\[1\]\.weight: 0\.5 -> 0\.1"):
        check_changes(before, other_weight, allowed=False)
