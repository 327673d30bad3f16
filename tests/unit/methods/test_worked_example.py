"""The worked example of docs/methods.md runs, and its tables and YAML agree with the code and the presets."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from megatron_chord import config, config_methods
from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.config_nodes import types_of
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.losses.objective import objective
from megatron_chord.losses.terms import TermTokens, empty_output
from megatron_chord.methods import table
from megatron_chord.methods.base import Method
from megatron_chord.records import TrainSample
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.schedules import MuSchedule
from tests.support.ranks import ROOT
from tests.support.tiny import terms_of
from tests.unit.methods.guided import (
    RIGHT,
    WRONG,
    answer,
    constants,
    guided_run,
    scripted_draw,
    stats_of,
    tokens_of,
)

DOC = (ROOT / "docs" / "methods.md").read_text()
PRESETS = {
    path.stem: path
    for path in (ROOT / "examples" / "methods").glob("*.yaml")
    if path.stem not in ("common", "aligned")
}
SHARED = {"output", "base", "data", "parallel"}
"""The blocks that a preset may set although the table does not mention them."""

ANSWERS = [[answer(RIGHT), answer(WRONG), answer(WRONG)], [answer(WRONG)] * 3]


def blocks(language: str) -> list[str]:
    """Return the fenced blocks. Blocks within a list lose their indentation."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", DOC, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{match[1]}", "", match[2], flags=re.MULTILINE) for match in found]


def rows() -> list[list[str]]:
    """Return the rows of the table of methods."""
    _, _, after = DOC.partition("| method and preset |")
    lines = after.split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def words() -> set[str]:
    """Return the names within code, inline or fenced."""
    code = re.findall(r"```.*?```|`[^`\n]+`", DOC, re.DOTALL)
    return {word for text in code for word in re.findall(r"\w+", text) + re.findall(r"\w+(?:-\w+)+", text)}


# ---- the worked example


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Method]]:
    """The documented class with its settings, registered as the text says."""
    settings_source, source = blocks("python")
    namespace = dict(vars(config_methods))
    exec(compile(settings_source, "docs/methods.md", "exec"), namespace)
    settings: Any = namespace["RLWithSFTConfig"]
    monkeypatch.setattr(config_methods, "RLWithSFTConfig", settings, raising=False)
    monkeypatch.setattr(config, "MethodConfig", config.MethodConfig | settings)
    module = ModuleType("megatron_chord.methods.rl_with_sft")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "docs/methods.md", "exec"), module.__dict__)
    kind: type[Method] = module.__dict__["RLWithSFT"]
    monkeypatch.setitem(table.METHODS, settings.name, kind)
    types_of.cache_clear()
    yield kind
    monkeypatch.undo()
    types_of.cache_clear()


def tokens_of_term(samples: Sequence[TrainSample], term: str, start: int) -> TermTokens:
    """Return all of a term's tokens in one micro-batch, from its token ``start`` on."""
    parts = [part for sample in samples for part in sample.parts if part.term == term]
    columns = {
        name: [float(part.constants[name]) for part in parts for _ in part.positions]
        for name in parts[0].constants
        if name != "rollout_logprob"
    }
    tokens = tokens_of([len(part.positions) for part in parts], rollout_logprob=-1.5, **columns)
    return dataclasses.replace(tokens, index=tokens.index + start)


def test_it_draws_weighs_and_scales_as_the_formula_says(example: type[Method]) -> None:
    run = guided_run("rl_with_sft", prompts=2, settings={"coefficient": 0.5}, advantage="group_mean")
    method = table.method_of(run)
    assert type(method) is example
    collected = method.collect(scripted_draw(run, ANSWERS, [RIGHT, RIGHT]))

    # The rewards are 1 0 0 and 0 0 0. Those of demonstrations are not among them.
    policy = constants(collected.samples, "policy", "advantage")
    assert policy == {0: pytest.approx([2 / 3, -1 / 3, -1 / 3]), 1: [0.0] * 3}
    demonstrations = [sample for sample in collected.samples if sample.parts[0].term == "sft"]
    # The cursor decides the order of the prompts.
    assert sorted(sample.token_ids.tolist() for sample in demonstrations) == [
        [100, 3, 30, 31, RIGHT],
        [101, 3, 30, 31, RIGHT],
    ]
    assert [sample.parts[0].positions.tolist() for sample in demonstrations] == [[2, 3, 4]] * 2
    assert collected.weights == {"policy": 1.0, "sft": 0.5}
    assert collected.mu is None
    assert collected.stats["reward_mean"] == pytest.approx(1 / 6)

    # Six rollouts of 2 tokens, two demonstrations of 3: each branch is a mean over its own tokens.
    scaled = with_scales(collected.samples, terms_of(run))
    assert constants(scaled, "policy", "scale") == {0: [1 / 12] * 3, 1: [1 / 12] * 3}
    assert constants(scaled, "sft", "scale") == {0: [1 / 6], 1: [1 / 6]}


def test_its_loss_and_gradient_by_hand(example: type[Method]) -> None:
    run = guided_run("rl_with_sft", prompts=2, settings={"coefficient": 0.5}, advantage="group_mean")
    method = table.method_of(run)
    terms = terms_of(run)
    collected = method.collect(scripted_draw(run, ANSWERS, [RIGHT, RIGHT]))
    scaled = with_scales(collected.samples, terms)
    tokens = {"policy": tokens_of_term(scaled, "policy", 0), "sft": tokens_of_term(scaled, "sft", 12)}
    advantages = tokens["policy"]["advantage"].tolist()

    # The engine's log-probs are -1.5. Tokens with A > 0 became 1.1 times as likely, the others did not change.
    ratios = [1.1 if advantage > 0 else 1.0 for advantage in advantages]
    stats = stats_of([ratio * math.exp(-1.5) for ratio in ratios] + [0.5] * 6)
    share = objective(stats, tokens, terms, collected.weights)
    # L_RL = -(2 x 1.1 x 2/3 - 4 x 1/3) / 12 = -1/90; L_SFT = ln 2.
    assert share.loss.item() == pytest.approx(-1 / 90 + 0.5 * math.log(2), rel=1e-6)

    share.loss.backward()
    assert stats.logprobs.grad is not None
    of_policy = [-ratio * advantage / 12 for ratio, advantage in zip(ratios, advantages, strict=True)]
    assert stats.logprobs.grad.tolist() == pytest.approx([*of_policy, *[-0.5 / 6] * 6], rel=1e-6, abs=1e-12)
    assert share.sums["sft"]["sft_loss"].item() == pytest.approx(math.log(2))


@pytest.mark.usefixtures("example")
def test_it_reports_names_of_its_own_and_what_the_log_prob_check_reads() -> None:
    run = guided_run("rl_with_sft")
    outputs = [empty_output(term) for term in terms_of(run).values()]
    names = [key for output in outputs for key in (*output.losses, *output.means, *output.maxima)]
    assert len(names) == len(set(names))
    assert {"logprob_gap", "logprob_gap_max"} <= set(names)
    assert all(torch.is_tensor(output.loss) and len(output.loss) == 0 for output in outputs)


@pytest.mark.usefixtures("example")
def test_wrong_settings_of_it_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for settings, message in (
        ("coefficient: 0", r"run.yaml:2: method\.coefficient must be > 0, got 0"),
        ("coefficient: much", "run.yaml:2: method.coefficient: expected float, got 'much'"),
        ("coeficient: 1.0", "run.yaml:2: .*did you mean method.coefficient"),
    ):
        file.write_text(
            f"base: {ROOT}/examples/methods/aligned.yaml\nmethod: {{name: rl_with_sft, {settings}}}\n"
        )
        with pytest.raises(ConfigError, match=message):
            load_config(file)
    run = guided_run("rl_with_sft")
    with pytest.raises(ValueError, match=r"set data\.aligned: true"):
        table.method_of(dataclasses.replace(run, data=dataclasses.replace(run.data, aligned=False)))


@pytest.mark.usefixtures("example")
def test_every_yaml_block_is_a_run(tmp_path: Path) -> None:
    found = blocks("yaml")
    assert len(found) >= 3
    for index, text in enumerate(found):
        file = tmp_path / f"{index}.yaml"
        file.write_text(text.replace("base: ", f"base: {ROOT}/examples/methods/", 1))
        table.method_of(load_config(file))


# ---- the tables


def test_the_table_has_a_row_for_every_preset_and_every_method() -> None:
    linked = [re.findall(r"\[`(\w+)`\]\(\.\./examples/methods/(\w+)\.yaml\)", row[0]) for row in rows()]
    assert all(len(links) == 1 and links[0][0] == links[0][1] for links in linked)
    assert sorted(links[0][0] for links in linked) == sorted(PRESETS)
    named = {settings_of(row)["method"].get("name", "chord") for row in rows()}
    assert named == set(table.METHODS)


def test_the_page_of_sources_has_every_preset_once() -> None:
    rows_of_page = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "presets.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows_of_page))) == sorted(PRESETS)


def settings_of(row: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of the row's YAML, by block."""
    found: dict[str, dict[str, Any]] = {"method": {}, "objective": {}}
    for text in re.findall(r"`([^`]+)`", row[1]):
        ((name, value),) = yaml.safe_load(text).items()
        block, _, name = name.rpartition(".")
        found.setdefault(block or "objective", {})[name] = value
    return found


def test_the_table_says_what_the_presets_say() -> None:
    for row in rows():
        (name,) = re.findall(r"methods/(\w+)\.yaml", row[0])
        said, preset = settings_of(row), yaml.safe_load(PRESETS[name].read_text())
        assert said["objective"] == preset.get("objective", {}), name
        assert said["method"].get("name", "chord") == preset.get("method", {}).get("name"), name
        for block, settings in said.items():
            assert settings.items() <= preset.get(block, {}).items(), f"{name}: {block}"
        assert set(preset) - SHARED <= set(said), name


def test_every_note_that_the_table_cites_is_there_and_every_note_is_cited() -> None:
    cited = {int(number) for row in rows() for number in row[5].split(",")}
    _, _, after = DOC.partition("\n## Notes\n")
    written = [int(number) for number in re.findall(r"^(\d+)\. \*\*", after.split("\n## ")[0], re.MULTILINE)]
    assert written == list(range(1, len(written) + 1))
    assert cited == set(written)


def test_every_name_of_the_objective_is_explained() -> None:
    """The text has the names of all schedules, token weights, their settings and values, and the methods' own
    settings."""
    kinds: list[Any] = [config.ObjectiveConfig, config.KLConfig, config.CorrectionConfig]
    kinds += [
        *get_args(MuSchedule),
        *get_args(config_methods.TokenWeight),
        *get_args(config_methods.MethodConfig),
    ]
    expected = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    hints = [hint for kind in kinds for hint in get_type_hints(kind).values()]
    hints += [get_type_hints(MathReward)["format"]]
    expected |= {value for hint in hints if get_origin(hint) is Literal for value in get_args(hint)}
    assert {"warmup_cosine", "phi", "entropy_top", "token-mean", "leave_one_out", "k3", "trinity"} <= expected
    assert expected - words() == set()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", DOC):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
