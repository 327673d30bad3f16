"""Settings are read from YAML and overrides. Every finding says where it is."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megatron_chord import config, config_methods, schedules
from megatron_chord.config import RunConfig
from megatron_chord.config_io import ConfigError, dump_config, load_config, load_suite, located, one_line
from megatron_chord.config_nodes import members, setting_names, types_of
from megatron_chord.config_suite import SuiteConfig
from megatron_chord.rewards.kinds.base import OverlongConfig
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.rewards.table import SumReward
from tests.support.ranks import ROOT

GOOD = """\
output: runs/x
steps: 20
model:
  path: policy
data:
  prompts: train.jsonl
  demonstrations: demonstrations.jsonl
batch: {prompts: 4, rollouts: 8, demonstrations: 16}
optim:
  lr: 1e-6
"""


SCHEDULES = [kind.__dataclass_fields__["schedule"].default for kind in get_args(schedules.MuSchedule)]


def write_yaml(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def good_run(tmp_path: Path, more: str = "", *overrides: str) -> RunConfig:
    """The run of ``GOOD`` with ``more`` settings."""
    return load_config(write_yaml(tmp_path, GOOD + more), overrides)


def findings(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value).replace(f"{path.parent}/", "").splitlines()


def only_finding(tmp_path: Path, more: str, *overrides: str) -> str:
    (finding,) = findings(write_yaml(tmp_path, GOOD + more), *overrides)
    return finding


def test_values_paths_and_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, GOOD)
    run = load_config(
        path,
        ["optim.beta2=0.95", "method.mu.peak=0.3", "data.demonstrations=other.jsonl", "model.dtype=fp32"],
    )
    assert run.optim == config.OptimConfig(lr=1e-6, beta2=0.95)
    assert run.method.mu == schedules.Constant(peak=0.3)
    assert run.model.path == tmp_path / "policy"
    assert run.data.demonstrations == config.sources_of(Path("other.jsonl"))
    assert run.output == Path("runs/x")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (("optim:", "optimm:"), "run.yaml:9: unknown setting 'optimm'; did you mean optim?"),
        (("  lr: 1e-6", "  lrr: 1e-6"), "run.yaml:10: unknown setting 'optim.lrr'; did you mean optim.lr?"),
        (("  lr: 1e-6", "  lr: fast"), "run.yaml:10: optim.lr: expected float, got 'fast'"),
        (("  lr: 1e-6", "  lr:"), "run.yaml:10: optim.lr: is empty; expected float"),
        (("  lr: 1e-6", "  lr: -1"), "run.yaml:10: optim.lr must be > 0, got -1.0"),
        (("  lr: 1e-6", "  [lr]: 1e-6"), "run.yaml:10: optim: expected a name, got a list"),
        (("steps: 20\n", ""), "run.yaml:1: steps is missing"),
        (("steps: 20", "steps: many"), "run.yaml:2: steps: expected int, got 'many'"),
        (
            ("  path: policy", "  path: policy\n  dtype: int8"),
            "run.yaml:5: model.dtype: 'int8' is none of fp32, bf16",
        ),
        (("  path: policy", "  path: ''"), "run.yaml:4: model.path: is empty; expected a path"),
        (("rollouts: 8", "rollouts: 1"), "batch.rollouts must be >= 2"),
        (("model:\n  path: policy", "model: policy"), "run.yaml:3: model: expected a block of settings"),
        (("model:\n  path: policy", "model:"), "run.yaml:3: model: expected a block of settings"),
        (("steps: 20", "steps: 20\nsteps: 30"), "run.yaml:3: steps is set twice"),
        (("steps: 20", "steps: [20"), "not valid YAML"),
        (("steps: 20", "steps: 20\n\x07"), "run.yaml: not valid YAML"),
        (
            ("  path: policy", "  path: policy\n  megatron_overrides: {a: 1, a: 2}"),
            "run.yaml:5: model.megatron_overrides.a is set twice",
        ),
        (
            ("  path: policy", "  path: policy\n  megatron_overrides:\n    a: [1]"),
            "run.yaml:6: model.megatron_overrides.a: expected a single number, text, true or false, got a list",
        ),
        (
            (
                "  prompts: train.jsonl",
                "  prompts: train.jsonl\n  template_arguments: {date_string: 2024-07-26}",
            ),
            "run.yaml:7: data.template_arguments.date_string: expected a single number, text, true or false, or a "
            "list or mapping of these, got '2024-07-26'; a date is a text in quotes",
        ),
        (
            ("  prompts: train.jsonl", "  prompts: train.jsonl\n  template_arguments: {a: [{b: null}]}"),
            "run.yaml:7: data.template_arguments.a.b: expected a single number, text, true or false, or a list or "
            "mapping of these, got 'null'",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], finding: str) -> None:
    assert change[0] in GOOD
    assert finding in findings(write_yaml(tmp_path, GOOD.replace(*change)))[0]


def test_all_findings_come_together(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 20", "steps: many").replace("  lr: 1e-6", "  lrr: 1e-6")
    found = findings(write_yaml(tmp_path, text), "objective.my.peak=1", "nonsense")
    assert len(found) == 4
    assert any(
        line.startswith("override 'objective.my.peak=1': unknown setting 'objective.my'") for line in found
    )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1e-6", "did you mean optim.lr?"),
        (
            "temperature=1",
            "did you mean evaluation.sets.temperature or evaluation.temperature or rollout.temperature?",
        ),
        ("optimm.lr=1", "did you mean optim?"),
    ],
)
def test_a_setting_without_its_block_is_answered_with_its_full_name(
    tmp_path: Path, override: str, hint: str
) -> None:
    name = override.partition("=")[0].partition(".")[0]
    assert only_finding(tmp_path, "", override) == f"override {override!r}: unknown setting {name!r}; {hint}"


def test_a_number_in_place_of_a_schedule_is_a_constant(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, GOOD + "method: {mu: {schedule: linear, peak: 1, valley: 0}}\n")
    assert load_config(path, ["method.mu=0.5"]).method.mu == schedules.Constant(peak=0.5)
    assert load_config(path, ["method.mu=0.5", "method.mu.peak=0.3"]).method.mu == schedules.Constant(
        peak=0.3
    )
    assert findings(path, "objective.mu=0.5") == [
        "override 'objective.mu=0.5': objective.mu is now method.mu"
    ]


@pytest.mark.parametrize(
    ("settings", "finding"),
    [
        ("  decay_steps: 5\n", "optim.decay_steps has no effect with optim.schedule constant"),
        (
            "  schedule: linear\n  warmup_steps: 5\n  decay_steps: 5\n",
            "optim.decay_steps 5 must be above optim.warmup_steps 5",
        ),
        (
            "  schedule: linear\n  decay_steps: 5\n",
            "optim.decay_steps 5 is below steps 20, and optim.min_lr is 0: the steps after it would change nothing",
        ),
    ],
)
def test_a_horizon_that_will_not_do(tmp_path: Path, settings: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, settings)


def test_a_horizon_of_its_own(tmp_path: Path) -> None:
    assert good_run(tmp_path, "  schedule: linear\n").optim.horizon(20) == 20
    assert good_run(tmp_path, "  schedule: linear\n  decay_steps: 50\n").optim.horizon(20) == 50


def test_an_evaluation_interval_needs_problems(tmp_path: Path) -> None:
    finding = (
        "run.yaml:11: evaluation.every 5: there is nothing to evaluate; give held-out problems in data.evaluation "
        "or evaluation.sets, or set evaluation.every to 0"
    )
    assert only_finding(tmp_path, "evaluation: {every: 5}\n") == finding
    assert good_run(tmp_path, "evaluation: {every: 5}\n", "data.evaluation=x.jsonl").evaluation.every == 5
    assert good_run(tmp_path, "evaluation: {problems: 5}\n").evaluation.every == 0


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert findings(write_yaml(tmp_path, text)) == ["run.yaml: expected a mapping of settings"]


class TestBlocksOfSeveralKinds:
    """The blocks ``method.mu`` and ``method.token_weight`` have several forms."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("mu: {schedule: constant, peak: 0.5}", schedules.Constant(peak=0.5)),
            ("mu: {peak: 0.5}", schedules.Constant(peak=0.5)),
            ("mu: {}", schedules.Constant()),
            ("mu: constant", schedules.Constant()),
            ("mu: 0.5", schedules.Constant(peak=0.5)),
            ("mu: 0", schedules.Constant(peak=0.0)),
            ("mu: 1e-2", schedules.Constant(peak=0.01)),
            ("mu: 'constant'", schedules.Constant()),
            ("mu: periodic", schedules.Periodic()),
            ("mu: {peak: 0.9, valley: 0, schedule: linear}", schedules.Linear(peak=0.9, valley=0.0)),
            ("token_weight: phi", config_methods.SimpleWeight(kind="phi")),
            ("token_weight: {kind: p}", config_methods.SimpleWeight(kind="p")),
            ("token_weight: {kind: power, a: 2}", config_methods.PowerWeight(a=2.0)),
            ("token_weight: power", config_methods.PowerWeight()),
        ],
    )
    def test_the_naming_key_chooses(self, tmp_path: Path, text: str, expected: Any) -> None:
        method = good_run(tmp_path, f"method:\n  {text}\n").method
        assert getattr(method, text.partition(":")[0]) == expected

    def test_an_optional_block(self, tmp_path: Path) -> None:
        assert good_run(tmp_path, "objective: {kl: null}\n").objective.kl is None
        assert good_run(tmp_path, "objective: {kl: {}}\n").objective.kl == config.KLConfig()

    @pytest.mark.parametrize("kind", [*get_args(schedules.MuSchedule), *get_args(config_methods.TokenWeight)])
    def test_every_kind_is_reached_and_dumped(self, tmp_path: Path, kind: type) -> None:
        settings: dict[str, Any] = {
            field.name: {"kind": "one"}.get(field.name, 1)
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING
        }
        value = kind(**settings, **({"rate": 0.1} if kind is schedules.Learned else {}))
        name = "token_weight" if hasattr(value, "kind") else "mu"
        block = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
        path = write_yaml(tmp_path, GOOD + yaml.safe_dump({"method": {name: block}}))
        run = load_config(path, [f"output={tmp_path}"])
        assert getattr(run.method, name) == value
        assert load_config(write_yaml(tmp_path, dump_config(run))) == run

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            (
                "mu: {schedule: warmup_cosin}",
                f"run.yaml:12: method.mu.schedule: 'warmup_cosin' is none of {', '.join(SCHEDULES)}; did you mean "
                "warmup_cosine?",
            ),
            ("mu: binry", "run.yaml:12: method.mu.schedule: 'binry' is none of constant"),
            ("mu: {schedule: null}", "run.yaml:12: method.mu.schedule: '"),
            (
                "mu: {schedule: [linear]}",
                "run.yaml:12: method.mu.schedule: expected a single value, got a list",
            ),
            ("mu: [linear]", "run.yaml:12: method.mu: expected a block of settings, got a list"),
            ("mu: binary", "run.yaml:12: method.mu.switch_step is missing"),
            (
                "token_weight: {a: 2}",
                "run.yaml:12: method.token_weight.kind is missing; known: one, p, phi, power, clipped_is, "
                "trust_region, focal, bernoulli_entropy, entropy_top, entropy_norm, margin",
            ),
            (
                "token_weight: {kind: phi, a: 2}",
                "run.yaml:12: unknown setting 'method.token_weight.a'; known with `kind: phi`: kind",
            ),
            (
                "mu: {schedule: binary, switch_stp: 1, switch_step: 1}",
                "run.yaml:12: unknown setting 'method.mu.switch_stp'; known with `schedule: binary`: schedule, "
                "switch_step, reset_optimizer; did you mean method.mu.switch_step?",
            ),
            (
                "mu: {decay_steps: 3}",
                "unknown setting 'method.mu.decay_steps'; known with `schedule: constant`: schedule, peak; only "
                "`schedule: warmup_cosine` and `schedule: linear` have it",
            ),
            (
                "mu: {kind: linear}",
                "known with `schedule: constant`: schedule, peak; did you mean method.mu.schedule?",
            ),
            (
                "mu: {schedule: linear, schedule: linear, peak: 1, valley: 0}",
                "method.mu.schedule is set twice",
            ),
            ("mu:\n    peak: 2", "run.yaml:13: method.mu.peak must lie in [0, 1], got 2.0"),
            ("mu: 2", "run.yaml:12: method.mu.peak must lie in [0, 1], got 2.0"),
            ("token_weight: 2", "run.yaml:12: method.token_weight.kind: '2' is none of one"),
            ("mu: null", "run.yaml:12: method.mu: expected a block of settings, got 'null'"),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, text: str, finding: str) -> None:
        assert finding in only_finding(tmp_path, f"method:\n  {text}\n")

    def test_kind_and_schedule_of_other_blocks_choose_nothing(self, tmp_path: Path) -> None:
        run = good_run(tmp_path, "  schedule: cosine\nreward: {kind: exact, workers: 3}\n")
        assert run.optim == config.OptimConfig(lr=1e-6, schedule="cosine")
        assert run.reward == ExactReward(workers=3)
        assert good_run(tmp_path, "reward: exact\n").reward == ExactReward()


class TestMethod:
    """The block ``method`` is one of several dataclasses. Its name chooses the dataclass."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", config_methods.ChordConfig()),
            ("method: luffy", config_methods.LuffyConfig()),
            ("method: {name: luffy, gamma: 1}", config_methods.LuffyConfig(gamma=1.0)),
            ("method: {cutoff: 0.5}", config_methods.ChordConfig(cutoff=0.5)),
            ("method: {mu: {peak: 0}}", config_methods.ChordConfig(mu=schedules.Constant(peak=0.0))),
            ("method: {name: ghpo, cue: '1e-6'}", config_methods.GHPOConfig(cue="1e-6")),
        ],
    )
    def test_the_name_chooses(self, tmp_path: Path, text: str, expected: Any) -> None:
        assert good_run(tmp_path, text).method == expected

    @pytest.mark.parametrize("kind", get_args(config_methods.MethodConfig), ids=lambda kind: kind.name)
    def test_every_method_is_reached_and_dumped(self, tmp_path: Path, kind: type) -> None:
        run = good_run(tmp_path, f"method: {kind.name}\n", f"output={tmp_path}")
        assert run.method == kind()
        assert load_config(write_yaml(tmp_path, dump_config(run))) == run

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            ("{name: lufy}", "method.name: 'lufy' is none of chord, luffy, rl_plus, "),
            ("{name: lufy}", "; did you mean luffy?"),
            (
                "{name: luffy, gama: 1}",
                "unknown setting 'method.gama'; known with `name: luffy`: name, gamma, shaping; did you mean "
                "method.gamma?",
            ),
            (
                "{name: luffy, mu: 1}",
                "unknown setting 'method.mu'; known with `name: luffy`: name, gamma, shaping; only `name: chord` "
                "has it",
            ),
            ("{correction: none}", "; did you mean objective.correction?"),
            (
                "{tokn_weight: p}",
                "unknown setting 'method.tokn_weight'; known with `name: chord`: name, mu, ",
            ),
            ("{tokn_weight: p}", "; did you mean method.token_weight?"),
            ("{name: luffy, gamma: big}", "method.gamma: expected float, got 'big'"),
            ("{name: luffy, gamma: [1]}", "method.gamma: expected a single value, got a list"),
            ("{name: luffy, shaping: 1}", "method.shaping: expected true or false, got '1'"),
            ("{name: luffy, gamma: 0}", "method.gamma must be > 0, got 0.0"),
            ("{name: luffy, gamma: 1, gamma: 2}", "method.gamma is set twice"),
            ("{name: hpt, gate: 1}", "method.gate must lie in [0, 1), got 1.0"),
            ("{name: ghpo, stages: 4}", "method.stages 4 x method.stage_share 0.25 must lie in (0, 1)"),
            ("{name: [a]}", "method.name: expected a single value, got a list"),
            ("{cutoff: 0}", "method.cutoff must lie in (0, 1], got 0.0"),
            ("null", "method: expected a block of settings"),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, text: str, finding: str) -> None:
        found = only_finding(tmp_path, f"method: {text}\n")
        assert found.startswith("run.yaml:11: ")
        assert finding in found

    @pytest.mark.parametrize("name", config_methods.PRESETS)
    def test_the_name_of_a_preset_leads_to_its_file(self, tmp_path: Path, name: str) -> None:
        found = only_finding(tmp_path, "", f"method={name}")
        method = config_methods.PRESETS[name]
        assert found == (
            f"override 'method={name}': method.name: {name!r} is a preset of method {method}: write "
            f"base: examples/methods/{name}.yaml"
        )
        preset = load_config(ROOT / "examples" / "methods" / f"{name}.yaml")
        assert preset.method.name == method

    def test_every_preset_of_another_name_is_listed(self) -> None:
        methods = {kind.name for kind in get_args(config_methods.MethodConfig)}
        files = {path.stem for path in (ROOT / "examples" / "methods").glob("*.yaml")}
        assert set(config_methods.PRESETS) == files - methods - {"common", "aligned"}

    def test_capitals_lead_there_too(self, tmp_path: Path) -> None:
        assert "examples/methods/grpo.yaml" in only_finding(tmp_path, "method: GRPO\n")
        assert "examples/methods/dr_grpo.yaml" in only_finding(tmp_path, "method: {name: Dr-GRPO}\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch.max_tokens", "batch.max_tokens_per_gpu"),
        ("batch.mini_batches", "batch.updates_per_step"),
        ("parallel.timeout_s", "timeouts.collective_s"),
        ("reward.overlong_cache", "reward.overlong.cache"),
        ("reward.overlong_penalty", "reward.overlong.penalty"),
        ("rollout.lag", "rollout.asynchronous.max_off_policy_steps"),
        ("rollout.in_flight", "rollout.asynchronous.in_flight"),
        ("rollout.extra_prompts", "rollout.partial.extra_prompts"),
        ("rollout.unfinished", "rollout.partial.unfinished"),
        ("rollout.max_carries", "rollout.partial.max_carries"),
        ("rollout.start_timeout_s", "timeouts.server_start_s"),
        ("rollout.request_timeout_s", "timeouts.sampling_s"),
        ("rollout.sync_timeout_s", "timeouts.weight_push_s"),
        ("objective.mu", "method.mu"),
        ("objective.token_weight", "method.token_weight"),
        ("objective.sft_cutoff", "method.cutoff"),
        ("objective.sft_aggregation", "method.aggregation"),
        ("objective.sft_temperature", "method.sft_temperature"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    block, _, name = old.rpartition(".")
    text = (
        GOOD.replace("batch: {", f"batch: {{{name}: 1, ")
        if block == "batch"
        else f"{GOOD}{block}: {{{name}: 1}}\n"
    )
    line = 8 if block == "batch" else 11
    assert findings(write_yaml(tmp_path, text)) == [f"run.yaml:{line}: {old} is now {new}"]
    assert only_finding(tmp_path, "", f"{old}=1") == f"override '{old}=1': {old} is now {new}"
    assert new in setting_names(RunConfig)


@pytest.mark.parametrize(
    ("setting", "old", "new"),
    [
        ("objective.advantage", "group", "group_mean"),
        ("objective.aggregation", "constant", "seq-mean-token-sum-norm"),
        ("method.aggregation", "sequence_mean", "seq-mean-token-mean"),
    ],
)
def test_an_old_value_is_answered_with_the_new_one(tmp_path: Path, setting: str, old: str, new: str) -> None:
    found = only_finding(tmp_path, "", f"{setting}={old}")
    assert found == f"override '{setting}={old}': {setting}: {old} is now {new}"
    good_run(tmp_path, "", f"{setting}={new}")


class TestPlaces:
    """A rule that is checked after reading names its settings. The error finds their places in the file and the
    overrides."""

    @pytest.mark.parametrize(
        ("message", "place"),
        [
            ("optim.lr and steps do not go together", "run.yaml:10: "),
            ("method.mu can be above 0 but batch.demonstrations is 0", "run.yaml:8: "),
            ("data.aligned needs data.demonstrations", "run.yaml:7: "),
            ("method luffy needs every prompt's own demonstration: set data.aligned: true", "run.yaml:5: "),
            ("rollout.sleep cannot be", "run.yaml: "),
            ("train.jsonl:3: no field 'answer'", ""),
            ("optim.nonsense", ""),
        ],
    )
    def test_of_a_message(self, tmp_path: Path, message: str, place: str) -> None:
        path = write_yaml(tmp_path, GOOD)
        assert located(message, path).replace(f"{tmp_path}/", "") == place + message

    def test_of_an_override(self, tmp_path: Path) -> None:
        found = located("optim.lr is odd", write_yaml(tmp_path, GOOD), ["seed=1", "optim.lr=3"])
        assert found == "override 'optim.lr=3': optim.lr is odd"

    def test_rules_of_several_blocks_name_the_line(self, tmp_path: Path) -> None:
        found = only_finding(tmp_path, "  warmup_steps: 20\nseed: 1\n")
        assert found == (
            "run.yaml:11: optim.warmup_steps 20 must be below steps 20: no step would have the full learning rate"
        )


def test_a_block_in_one_line_has_every_number() -> None:
    assert one_line(config_methods.ChordConfig()) == (
        "chord: mu constant (peak 0.1), token_weight phi, cutoff 1.0, aggregation token-mean, sft_temperature 1.0"
    )
    method = config_methods.ChordConfig(
        mu=schedules.Binary(switch_step=3), token_weight=config_methods.FocalWeight()
    )
    assert one_line(method).startswith(
        "chord: mu binary (switch_step 3, reset_optimizer off), token_weight focal (exponent 2.0), cutoff 1.0"
    )
    assert one_line(config_methods.SimpleWeight(kind="phi")) == "phi"
    objective = one_line(config.ObjectiveConfig(kl=config.KLConfig()))
    assert "clip_low 0.2, clip_high 0.2, ratio_from rollout" in objective
    assert objective.endswith(
        "entropy_bonus 0.0, entropy_bonus_on rollouts, kl (estimator k3, coefficient 0.001, reference none)"
    )


class TestDump:
    def test_reads_back_to_the_same(self, tmp_path: Path) -> None:
        method = config_methods.ChordConfig(
            mu=schedules.WarmupCosine(peak=0.9, valley=0.05, decay_steps=200),
            token_weight=config_methods.MarginWeight(width=0.3),
        )
        objective = config.ObjectiveConfig(
            kl=config.KLConfig(reference=tmp_path / "reference"),
            correction=config.CorrectionConfig(high=math.inf),
            ratio_from="current",
        )
        texts = [
            "1e-6",
            "1",
            "1.5",
            "null",
            "~",
            "true",
            "yes",
            "",
            " ",
            "a: b",
            "# x",
            "1:30",
            "0x1f",
            "2020-01-01",
        ]
        texts += [".inf", "inf", "nan", "-1E5", "two\nlines\n", "\x85\ttab", "é", "[a]", "<<", "="]
        numbers: dict[str, Any] = {
            "i": 7,
            "f": 1e-9,
            "g": 1e22,
            "h": -math.inf,
            "b": False,
            "1e3": 1,
            "null": 2,
        }
        run = RunConfig(
            output=tmp_path / "out",
            steps=3,
            model=config.ModelConfig(
                path=tmp_path / "p",
                megatron_overrides={**{f"t{index}": text for index, text in enumerate(texts)}, **numbers},
            ),
            data=config.DataConfig(
                prompts=config.sources_of(tmp_path / "x"),
                system_prompt="null",
                template_arguments={
                    "off": False,
                    "date": "2024-07-26",
                    "words": ["a", 1, {"b": "no", "c": 0.5}],
                },
            ),
            batch=config.BatchConfig(prompts=1, rollouts=2, demonstrations=0),
            method=method,
            objective=objective,
            reward=MathReward(answer_marker=" "),
            rollout=config.RolloutConfig(servers=("http://a:1", "1e5")),
        )
        again = load_config(write_yaml(tmp_path / "other", dump_config(run)))
        assert again == run
        assert [type(value) for value in again.model.megatron_overrides.values()] == [
            type(value) for value in run.model.megatron_overrides.values()
        ]

    def test_of_a_run_with_defaults_only(self, tmp_path: Path) -> None:
        run = good_run(tmp_path, "", f"output={tmp_path / 'out'}")
        dumped = yaml.safe_load(dump_config(run))
        assert dumped["objective"]["kl"] is None
        assert dumped["method"] == {
            "name": "chord",
            "mu": {"schedule": "constant", "peak": 0.1},
            "token_weight": {"kind": "phi"},
            "cutoff": 1.0,
            "aggregation": "token-mean",
            "sft_temperature": 1.0,
        }
        assert load_config(write_yaml(tmp_path, dump_config(run))) == run


class TestOverrides:
    FILE = (
        "method:\n  mu: {schedule: linear, peak: 0.9, valley: 0.1, decay_steps: 5}\n  token_weight: power\n"
    )

    @pytest.mark.parametrize(
        ("method", "overrides", "expected"),
        [
            ("luffy", ["method.gamma=0.2"], config_methods.LuffyConfig(gamma=0.2)),
            ("{name: luffy, gamma: 0.3}", ["method.gamma=1e-6"], config_methods.LuffyConfig(gamma=1e-6)),
            ("{name: luffy, gamma: 0.3}", ["method.name=rl_plus"], config_methods.RLPlusConfig(gamma=0.3)),
            ("{name: luffy, gamma: 0.3}", ["method=rl_plus"], config_methods.RLPlusConfig()),
            ("luffy", ["method={name: hpt, gate: 0.5}"], config_methods.HPTConfig(gate=0.5)),
            ("chord", ["method=luffy", "method.gamma=0.2"], config_methods.LuffyConfig(gamma=0.2)),
        ],
    )
    def test_of_the_method(self, tmp_path: Path, method: str, overrides: list[str], expected: Any) -> None:
        assert good_run(tmp_path, f"method: {method}\n", *overrides).method == expected

    @pytest.mark.parametrize(
        ("overrides", "mu"),
        [
            (["method.mu.peak=0"], schedules.Linear(peak=0.0, valley=0.1, decay_steps=5)),
            (
                ["method.mu.schedule=warmup_cosine"],
                schedules.WarmupCosine(peak=0.9, valley=0.1, decay_steps=5),
            ),
            (["method.mu=constant"], schedules.Constant()),
            (["method.mu=constant", "method.mu.peak=0"], schedules.Constant(peak=0.0)),
            (["method.mu={schedule: binary, switch_step: 3}"], schedules.Binary(switch_step=3)),
            (["method.mu=null", "method.mu.peak=0.2"], schedules.Constant(peak=0.2)),
        ],
    )
    def test_of_mu(self, tmp_path: Path, overrides: list[str], mu: Any) -> None:
        assert good_run(tmp_path, self.FILE, *overrides).method.mu == mu

    def test_below_a_block_s_single_value(self, tmp_path: Path) -> None:
        run = good_run(tmp_path, self.FILE, "method.token_weight.a=3")
        assert run.method.token_weight == config_methods.PowerWeight(a=3.0)
        run = good_run(tmp_path, self.FILE, "method.token_weight=phi")
        assert run.method.token_weight == config_methods.SimpleWeight(kind="phi")

    def test_of_blocks_that_are_not_in_the_file(self, tmp_path: Path) -> None:
        thinking = "data.template_arguments.enable_thinking=false"
        run = good_run(
            tmp_path,
            "",
            "objective.kl.coefficient=0.1",
            "model.megatron_overrides.x=1e-3",
            "seed=3",
            thinking,
        )
        assert run.data.template_arguments == {"enable_thinking": False}
        assert run.objective.kl == config.KLConfig(coefficient=0.1)
        assert run.model.megatron_overrides == {"x": 1e-3}
        assert run.seed == 3

    @pytest.mark.parametrize(
        ("override", "finding"),
        [
            ("method.mu.schedule=constant", "run.yaml:12: unknown setting 'method.mu.valley'"),
            (
                "method.mu.schedule=no",
                "override 'method.mu.schedule=no': method.mu.schedule: 'no' is none of",
            ),
            ("method.mu=no", "override 'method.mu=no': method.mu.schedule: 'no' is none of"),
            (
                "method.mu.peak=[1]",
                "override 'method.mu.peak=[1]': method.mu.peak: expected a single value",
            ),
            (
                "objective.kl.coefficient=0",
                "override 'objective.kl.coefficient=0': objective.kl.coefficient must be > 0",
            ),
            ("steps.x=1", "override 'steps.x=1': steps: expected a single value, got a mapping"),
            ("steps", "override 'steps': expected name=value"),
            ("=1", "override '=1': expected name=value"),
            ("base=b.yaml", "override 'base=b.yaml': base can only be set in a file, not as an override"),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, override: str, finding: str) -> None:
        assert finding in findings(write_yaml(tmp_path, GOOD + self.FILE), override)[0]

    def test_hide_no_setting_that_is_set_twice(self, tmp_path: Path) -> None:
        text = GOOD + "optim:\n  lr: 1\n"
        assert findings(write_yaml(tmp_path, text), "optim.lr=2") == ["run.yaml:11: optim is set twice"]

    def test_of_what_is_no_yaml_are_text(self, tmp_path: Path) -> None:
        assert good_run(tmp_path, "", "data.system_prompt=a: b: c").data.system_prompt == "a: b: c"


class TestBase:
    def test_settings_replace_the_base_s_key_by_key(self, tmp_path: Path) -> None:
        write_yaml(
            tmp_path, GOOD + "reward: {kind: exact, workers: 3}\nrollout: {servers: [a, b]}\n", "base.yaml"
        )
        run = load_config(
            write_yaml(
                tmp_path,
                "steps: 30\nbase: base.yaml\noptim: {schedule: cosine}\nreward: {kind: math}\n"
                "rollout: {servers: [c]}\n",
            )
        )
        assert run.steps == 30
        assert run.optim == config.OptimConfig(lr=1e-6, schedule="cosine")
        assert run.reward == MathReward()
        assert run.rollout.servers == ("c",)
        assert "base" not in yaml.safe_load(dump_config(run))

    @pytest.mark.parametrize(
        ("below", "own", "expected"),
        [
            ("{schedule: linear, peak: 1, valley: 0}", "{valley: 1}", schedules.Linear(peak=1.0, valley=1.0)),
            ("{schedule: constant, peak: 0.5}", "{schedule: constant}", schedules.Constant(peak=0.5)),
            ("{schedule: linear, peak: 1, valley: 0}", "periodic", schedules.Periodic()),
            ("periodic", "{sft_steps: 3}", schedules.Periodic(sft_steps=3)),
            ("{peak: 0.5}", "{schedule: constant}", schedules.Constant(peak=0.5)),
            ("null", "{peak: 0.3}", schedules.Constant(peak=0.3)),
        ],
    )
    def test_another_choice_replaces_the_whole_block(
        self, tmp_path: Path, below: str, own: str, expected: Any
    ) -> None:
        write_yaml(tmp_path, GOOD + f"method: {{cutoff: 0.3, mu: {below}}}\n", "base.yaml")
        run = load_config(write_yaml(tmp_path, f"base: base.yaml\nmethod: {{mu: {own}}}\n"))
        assert run.method == config_methods.ChordConfig(cutoff=0.3, mu=expected)

    @pytest.mark.parametrize(
        ("below", "own", "expected"),
        [
            ("{name: luffy, gamma: 1}", "{name: luffy, shaping: no}", {"gamma": 1.0, "shaping": False}),
            ("{name: luffy, gamma: 1}", "{shaping: no}", {"gamma": 1.0, "shaping": False}),
            ("luffy", "{gamma: 2}", {"gamma": 2.0}),
            ("{cutoff: 0.5}", "{name: luffy, gamma: 2}", {"gamma": 2.0}),
            ("rl_plus", "luffy", {}),
        ],
    )
    def test_of_the_method(self, tmp_path: Path, below: str, own: str, expected: dict[str, Any]) -> None:
        write_yaml(tmp_path, GOOD + f"method: {below}\n", "base.yaml")
        run = load_config(write_yaml(tmp_path, f"base: base.yaml\nmethod: {own}\n"))
        assert run.method == config_methods.LuffyConfig(**expected)

    def test_the_default_method_is_not_another_choice(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD + "method: {cutoff: 0.5}\n", "base.yaml")
        run = load_config(write_yaml(tmp_path, "base: base.yaml\nmethod: {name: chord, mu: {peak: 0}}\n"))
        assert run.method == config_methods.ChordConfig(cutoff=0.5, mu=schedules.Constant(peak=0.0))

    def test_free_mappings_merge_and_overrides_come_last(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD, "base.yaml")
        write_yaml(tmp_path, "base: base.yaml\nmodel: {megatron_overrides: {a: 1, b: 1}}\n", "middle.yaml")
        run = load_config(
            write_yaml(tmp_path, "base: middle.yaml\nmodel: {megatron_overrides: {b: 2, c: 2}}\n"),
            ["model.megatron_overrides.c=3"],
        )
        assert run.model.megatron_overrides == {"a": 1, "b": 2, "c": 3}

    def test_paths_are_relative_to_the_file_that_has_them(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD, "low/base.yaml")
        write_yaml(tmp_path, "base: low/base.yaml\ndata: {evaluation: heldout.jsonl}\n", "middle.yaml")
        run = load_config(
            write_yaml(tmp_path, "base: ../middle.yaml\ndata: {demonstrations: e.jsonl}\n", "high/run.yaml")
        )
        resolved = {
            name: sources[0].path[0].resolve()
            for name, sources in vars(run.data).items()
            if isinstance(sources, tuple)
        }
        root = tmp_path.resolve()
        assert resolved == {
            "prompts": root / "low/train.jsonl",
            "demonstrations": root / "high/e.jsonl",
            "evaluation": root / "heldout.jsonl",
        }
        assert run.output == Path("runs/x")

    def test_every_finding_names_its_own_file_and_line(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD + "rollout: {temprature: 1}\nsteps: 30\n", "base.yaml")
        text = "base: base.yaml\noptim:\n  lr: -1\nseed: x\n"
        assert sorted(findings(write_yaml(tmp_path, text), "optim.epss=1", "parallel.ranks=x")) == [
            "base.yaml:11: unknown setting 'rollout.temprature'; did you mean rollout.temperature?",
            "base.yaml:12: steps is set twice",
            "override 'optim.epss=1': unknown setting 'optim.epss'; did you mean optim.eps?",
            "override 'parallel.ranks=x': parallel.ranks: expected int, got 'x'",
            "run.yaml:4: seed: expected int, got 'x'",
        ]

    def test_a_broken_rule_is_told_at_the_block_of_the_upper_file(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD, "base.yaml")
        assert findings(write_yaml(tmp_path, "base: base.yaml\noptim:\n  min_lr: 1\n")) == [
            "run.yaml:3: optim.min_lr 1.0 is above optim.lr 1e-06"
        ]

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            ("steps: 1\nbase: none.yaml\n", "run.yaml:2: base: none.yaml: no such file"),
            ("base:\n", "run.yaml:1: base: expected the name of a YAML file"),
            ("base: [a.yaml]\n", "run.yaml:1: base: expected the name of a YAML file"),
            ("base: a.yaml\nbase: b.yaml\n", "run.yaml:2: base is set twice"),
            ("base: list.yaml\n", "list.yaml: expected a mapping of settings"),
            ("base: bad.yaml\n", "bad.yaml:2: not valid YAML"),
            ("base: run.yaml\n", "run.yaml:1: base: the base files form a circle: run.yaml -> run.yaml"),
            (
                "base: a.yaml\n",
                "b.yaml:2: base: the base files form a circle: run.yaml -> a.yaml -> b.yaml -> ./run.yaml",
            ),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, text: str, finding: str) -> None:
        write_yaml(tmp_path, "- 1\n", "list.yaml")
        write_yaml(tmp_path, "steps: 1\n]\n", "bad.yaml")
        write_yaml(tmp_path, "base: b.yaml\n", "a.yaml")
        write_yaml(tmp_path, "steps: 1\nbase: run.yaml\n", "b.yaml")
        (found,) = findings(write_yaml(tmp_path, text))
        assert found.startswith(finding.replace("./", ""))

    def test_one_base_may_be_reached_by_many(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD, "base.yaml")
        for name in ("a.yaml", "b.yaml"):
            assert load_config(write_yaml(tmp_path, "base: base.yaml\n", name)).steps == 20


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "rollout: {asynchronous: {max_off_policy_steps: 0}}",
            "rollout.asynchronous.max_off_policy_steps must be > 0, got 0",
        ),
        (
            "rollout: {asynchronous: {max_off_policy_steps: 2}}",
            "rollout.asynchronous.max_off_policy_steps 2 with in_flight: drain would only make rollouts older",
        ),
        ("rollout: {asynchronous: {in_flight: drop}}", "rollout.asynchronous.in_flight: 'drop' is none of"),
        (
            "rollout: {asynchronous: {}, sleep: true}",
            "rollout.sleep: with rollout.asynchronous servers sample",
        ),
        (
            "rollout: {asynchronous: {}, offload: true}",
            "rollout.offload: with rollout.asynchronous the ranks",
        ),
        (
            "rollout: {repeatable: true, servers: ['http://127.0.0.1:1']}",
            "start them with VLLM_BATCH_INVARIANT=1",
        ),
        ("rollout: {repeatable: true, asynchronous: {in_flight: keep}}", "set in_flight to drain"),
        ("rollout: {repeatable: true, partial: {}}", "the prompts that finish first depend on timing"),
        (
            "objective: {ratio_from: current, correction: {mode: none}}",
            "objective.correction.mode none turns off a correction that is on by default only with",
        ),
        (
            "rollout: {asynchronous: {}}\nobjective: {ratio_from: current, correction: {mode: none, high: 3}}",
            "objective.correction.mode none has no weight",
        ),
        (
            "rollout: {asynchronous: {}}\nobjective: {correction: {mode: none}}",
            "objective.correction and ratio_from: rollout would correct the same mismatch twice",
        ),
    ],
)
def test_sampling_ahead_and_what_goes_with_it(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, f"{text}\n")


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("{extra_prompts: -0.5}", "rollout.partial.extra_prompts must lie in (0, 4], got -0.5"),
        ("{extra_prompts: 0}", "without early stop leave rollout.partial out"),
        ("{extra_prompts: 25}", "must lie in (0, 4], got 25.0: it is a share of the step's prompts"),
        ("{unfinished: keep}", "rollout.partial.unfinished: 'keep' is none of carry, drop"),
        ("{max_carries: 0}", "rollout.partial.max_carries must be > 0, got 0"),
        (
            "{unfinished: drop, max_carries: 1}",
            "rollout.partial.max_carries has no effect with unfinished: drop",
        ),
        (
            "{unfinished: drop}}\nobjective: {ratio_from: current, correction: {mode: none}",
            "objective.correction.mode none turns off a correction",
        ),
    ],
)
def test_early_stop_and_what_goes_with_it(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, f"rollout: {{partial: {text}}}\n")


def test_what_only_means_something_together_is_off_without_its_block(tmp_path: Path) -> None:
    rollout = good_run(tmp_path).rollout
    assert (rollout.max_off_policy_steps, rollout.in_flight, rollout.carries) == (0, "drain", False)
    assert rollout.extra_of(16) == 0
    assert not rollout.has_older_tokens
    ahead = good_run(tmp_path, "", "rollout.asynchronous={}").rollout
    assert (ahead.max_off_policy_steps, ahead.in_flight, ahead.has_older_tokens) == (1, "drain", True)
    partial = good_run(tmp_path, "", "rollout.partial={}").rollout
    assert (partial.extra_of(16), partial.carries, partial.has_older_tokens) == (4, True, True)
    assert good_run(tmp_path, "rollout: {partial: {}}\n", "rollout.partial=null").rollout.partial is None
    assert good_run(tmp_path, "", "reward.overlong.cache=8").reward.overlong == OverlongConfig(cache=8)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("reward: {overlong: {}}", "run.yaml:11: reward.overlong.cache is missing"),
        ("reward: {overlong: {cache: 0}}", "run.yaml:11: reward.overlong.cache must be > 0, got 0"),
        (
            "reward: {overlong: {cache: 2000}}",
            "run.yaml:11: reward.overlong.cache 2000 is above data.max_resp",
        ),
        ("timeouts: {sampling_s: 0}", "run.yaml:11: timeouts.sampling_s must be > 0, got 0.0"),
    ],
)
def test_overlong_and_timeouts(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, f"{text}\n")


@pytest.mark.parametrize("axis", ["tensor", "expert"])
def test_ranks_may_wait_for_a_push_as_long_as_it_may_take(tmp_path: Path, axis: str) -> None:
    """The ranks of a later pipeline stage wait in its first gather until the earlier stages have pushed."""
    layout = f"parallel: {{pipeline: 2, {axis}: 2}}\n"
    finding = only_finding(tmp_path, f"{layout}timeouts: {{weight_push_s: 900}}\n")
    assert "timeouts.weight_push_s 900 is above timeouts.collective_s 600" in finding
    assert "parallel.pipeline 2" in finding
    assert f"parallel.{axis} 2" in finding
    for text in (
        f"{layout}timeouts: {{weight_push_s: 900, collective_s: 900}}\n",
        f"parallel: {{{axis}: 2}}\ntimeouts: {{weight_push_s: 900}}\n",
        "parallel: {pipeline: 2}\ntimeouts: {weight_push_s: 900}\n",
    ):
        assert good_run(tmp_path, text).timeouts.weight_push_s == 900


def test_a_temperature_that_vllm_refuses(tmp_path: Path) -> None:
    assert "rollout.temperature must be <= 2, got 3.0" in only_finding(
        tmp_path, "rollout: {temperature: 3}\n"
    )


@pytest.mark.parametrize(
    ("share", "count", "extra"),
    [(0.25, 16, 4), (0.25, 17, 5), (0.1, 30, 3), (0.3, 10, 3), (0.01, 3, 1), (1.0, 7, 7)],
)
def test_extra_prompts_are_a_share_rounded_up(share: float, count: int, extra: int) -> None:
    assert config.RolloutConfig(partial=config.PartialConfig(extra_prompts=share)).extra_of(count) == extra


def test_a_correction_that_is_turned_off(tmp_path: Path) -> None:
    run = good_run(
        tmp_path, "rollout: {asynchronous: {}}\nobjective: {ratio_from: current, correction: {mode: none}}\n"
    )
    assert run.objective.correction == config.CorrectionConfig(mode="none")


@pytest.mark.parametrize("precision", ["fp8_rollout", "fp8_e2e", "fp8_tensorwise"])
def test_fp8_is_one_line(tmp_path: Path, precision: str) -> None:
    run = good_run(tmp_path, f"precision: {precision}\n")
    without = good_run(tmp_path)
    assert run.precision == precision
    assert dataclasses.replace(run, precision=None) == without, "taking the line away is the way back to BF16"
    off = "objective: {ratio_from: current, correction: {mode: none}}\n"
    assert good_run(tmp_path, f"precision: {precision}\n{off}").objective.correction is not None


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("precision: fp8", "precision: 'fp8' is none of bf16, fp8_rollout, fp8_e2e, fp8_tensorwise"),
        (
            "precision: bf16\nobjective: {ratio_from: current, correction: {mode: none}}",
            "leave objective.correction out",
        ),
        ("precision: fp8_rollout\nrollout: {dtype: fp32}", "needs rollout.dtype to be bf16, got fp32"),
        ("rollout: {max_probability_error: 0.9}", "rollout.max_probability_error must be > 1, got 0.9"),
    ],
)
def test_what_goes_with_a_precision(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, f"{text}\n")


@pytest.mark.parametrize("precision", ["bf16", "fp8_e2e"])
def test_a_precision_needs_bf16_weights(tmp_path: Path, precision: str) -> None:
    found = only_finding(tmp_path, f"precision: {precision}\n", "model.dtype=fp32")
    assert f"precision {precision} needs model.dtype to be bf16, got fp32" in found


SOURCES_RUN = """output: out
steps: 1
model: {path: m}
batch: {prompts: 1, rollouts: 2, demonstrations: 1, max_tokens_per_gpu: 64}
data:
  demonstrations: d.jsonl
"""


def load_prompts_of(tmp_path: Path, text: str, *overrides: str) -> tuple[config.SourceConfig, ...]:
    path = tmp_path / "run.yaml"
    path.write_text(f"{SOURCES_RUN}  prompts: {text}\n")
    run = load_config(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(run))
    assert load_config(again).data == run.data
    return run.data.prompts


def test_prompts_are_one_path_several_or_blocks(tmp_path: Path) -> None:
    a, b, source = tmp_path / "a.jsonl", tmp_path / "b.jsonl", config.SourceConfig
    assert load_prompts_of(tmp_path, "a.jsonl") == (source(path=(a,)),)
    assert load_prompts_of(tmp_path, "[a.jsonl, b.jsonl]") == (source(path=(a, b)),)
    assert load_prompts_of(tmp_path, "{path: [a.jsonl, b.jsonl], name: both}") == (
        source(path=(a, b), name="both"),
    )
    found = load_prompts_of(
        tmp_path, "[{path: a.jsonl, weight: 3}, {path: b.jsonl, fields: {answer: x}, system_prompt: s}]"
    )
    assert found == (
        source(path=(a,), weight=3.0),
        source(path=(b,), fields={"answer": "x"}, system_prompt="s"),
    )
    assert [one.label for one in found] == ["a", "b"]


def test_overrides_of_a_source(tmp_path: Path) -> None:
    assert load_prompts_of(tmp_path, "a.jsonl", "data.prompts=/b.jsonl")[0].path == (Path("/b.jsonl"),)
    (source,) = load_prompts_of(tmp_path, "a.jsonl", "data.prompts.fields={answer: gold}")
    assert (source.path, source.fields) == ((tmp_path / "a.jsonl",), {"answer": "gold"})
    sources = load_prompts_of(
        tmp_path, "a.jsonl", "data.prompts=[{path: /x.jsonl}, {path: /y.jsonl, weight: 2}]"
    )
    assert [one.weight for one in sources] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{path: a.jsonl, fields: {answer: 3}}", "fields.answer must be a text such as answer.text, got 3"),
        ("[{path: a.jsonl, weight: 0}]", "weight must be > 0, got 0.0; leave the source out"),
        ("[{path: a.jsonl, weight: .inf}]", "weight must be > 0, got inf"),
        ("[{path: a.jsonl, name: a/b}]", "name must consist of letters, digits and . _ + -, got 'a/b'"),
        (
            "[{path: x/a.jsonl}, {path: y/a.jsonl}]",
            "data.prompts has several sources named a: give each its own",
        ),
        ("[{path: a.jsonl}, b.jsonl]", "data.prompts: expected a block of settings with path, got 'b.jsonl'"),
        ("[{weight: 1}]", "data.prompts.path is missing"),
        ("[{path: a.jsonl, wieght: 1}]", "unknown setting 'data.prompts.wieght'"),
        ("[]", "data.prompts lists no source"),
        ("null", "data.prompts: is empty"),
        ("a.jsonl\n  prompt_fields: {answer: x}", "data.prompt_fields is now data.prompts.fields"),
        ("a.jsonl\n  evaluation: [{path: e.jsonl, weight: 2}]", "data.evaluation.weight has no effect on e"),
    ],
)
def test_sources_that_will_not_do(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:\d+: .*" + re.escape(reason)):
        load_prompts_of(tmp_path, text)


def test_a_reward_function_is_found_from_the_folder_of_its_yaml_file(tmp_path: Path) -> None:
    reward = good_run(
        tmp_path, "reward: {kind: function, path: my.py, name: score, allow: [network]}\n"
    ).reward
    assert reward == FunctionReward(path=tmp_path / "my.py", name="score", allow=("network",))
    assert "reward.allow: 'internet' is none of network, subprocess, files" in only_finding(
        tmp_path, "reward: {kind: function, path: my.py, name: score, allow: [internet]}\n"
    )
    assert findings(write_yaml(tmp_path, GOOD + "reward: function\n")) == [
        "run.yaml:11: reward.path is missing",
        "run.yaml:11: reward.name is missing",
    ]


def test_settings_of_another_kind_of_reward_are_refused(tmp_path: Path) -> None:
    assert "unknown setting 'reward.answer_marker'; known with `kind: tool_calls`" in only_finding(
        tmp_path, "reward: {kind: tool_calls, answer_marker: x}\n"
    )


REWARDS = """
reward:
  - {kind: exact, workers: 3, format: chord}
  - kind: function
    path: my.py
    name: score
    weight: 0.2
  - tool_calls
"""


class TestListOfRewards:
    def test_is_the_sum_of_its_blocks(self, tmp_path: Path) -> None:
        run = good_run(tmp_path, REWARDS)
        function = FunctionReward(path=tmp_path / "my.py", name="score", weight=0.2)
        assert run.reward == SumReward(
            terms=(ExactReward(workers=3, format="chord"), function, ToolCallsReward())
        )
        assert load_config(write_yaml(tmp_path / "other", dump_config(run))).reward == run.reward
        assert good_run(tmp_path, REWARDS, "reward.overlong.cache=8").reward == dataclasses.replace(
            run.reward, overlong=OverlongConfig(cache=8)
        )
        assert good_run(tmp_path, "", "reward=[math, exact]").reward == SumReward(
            terms=(MathReward(), ExactReward())
        )

    @pytest.mark.parametrize(
        ("old", "new", "finding"),
        [
            ("workers: 3", "workers: 0", "run.yaml:13: reward.workers must be > 0, got 0"),
            ("weight: 0.2", "weight: .inf", "run.yaml:17: reward.weight must be a finite number, got inf"),
            (
                "    weight: 0.2",
                "    wieght: 2",
                "run.yaml:17: unknown setting 'reward.terms[1].wieght'; known with `kind: f",
            ),
            ("    path: my.py\n", "", "run.yaml:14: reward.terms[1].path is missing"),
            ("- tool_calls", "- sum", "run.yaml:18: reward.terms[2].kind: 'sum' is none of math, exact"),
            ("- tool_calls", "- 3.5", "run.yaml:18: reward.terms[2].kind: '3.5' is none of math, exact"),
            (
                "format: chord",
                "max_error_rate: 0.5",
                "run.yaml:13: reward.overlong and reward.max_error_rate hold for all",
            ),
        ],
    )
    def test_a_finding_names_the_line_of_its_block(
        self, tmp_path: Path, old: str, new: str, finding: str
    ) -> None:
        assert old in REWARDS
        assert only_finding(tmp_path, REWARDS.replace(old, new)).startswith(finding)

    def test_replaces_the_reward_of_a_base(self, tmp_path: Path) -> None:
        write_yaml(tmp_path, GOOD + "reward: {kind: exact, workers: 3}\n", "base.yaml")
        run = load_config(write_yaml(tmp_path, "base: base.yaml\nreward: [math]\n"))
        assert run.reward == SumReward(terms=(MathReward(),))
        write_yaml(tmp_path, GOOD + "reward: [math, exact]\n", "base.yaml")
        run = load_config(write_yaml(tmp_path, "base: base.yaml\nreward: {overlong: {cache: 4}}\n"))
        assert run.reward == SumReward(terms=(MathReward(), ExactReward()), overlong=OverlongConfig(cache=4))

    def test_a_list_in_place_of_another_block_is_refused(self, tmp_path: Path) -> None:
        assert "method: expected a block of settings, got a list" in only_finding(
            tmp_path, "method: [luffy]\n"
        )
        assert "reward.terms lists no reward" in only_finding(tmp_path, "reward: []\n")


WRONG = ("-1", "0", "x y", "[]", "[a.jsonl, b.jsonl]")
METHODS = {
    member.__dataclass_fields__["name"].default: member for member in members(types_of(RunConfig)["method"])
}


def places_of_findings(load: Callable[[], object]) -> set[str]:
    """What the findings about one override begin with; empty if it is valid."""
    try:
        load()
    except ConfigError as error:
        return {line.partition("': ")[0] for line in str(error).splitlines()}
    return set()


@pytest.mark.parametrize("method", METHODS)
def test_findings_about_overrides_name_the_override(tmp_path: Path, method: str) -> None:
    """Whatever an override breaks in a valid file, the place of the finding is the override, not a line of the file."""
    path = write_yaml(tmp_path, GOOD)
    names = [f"method.{field.name}" for field in dataclasses.fields(METHODS[method])]
    if method == "chord":
        names = sorted(setting_names(RunConfig))
    for override in (f"{name}={value}" for name in names for value in WRONG):
        found = places_of_findings(partial(load_config, path, [f"method={method}", override]))
        assert found <= {f"override {override!r}".rstrip("'"), f"override 'method={method}"}, found


def test_findings_about_overrides_of_a_suite_name_the_override() -> None:
    path = ROOT / "examples" / "suites" / "arithmetic.yaml"
    overrides = [f"{name}={value}" for name in sorted(setting_names(SuiteConfig)) for value in WRONG]
    wrong = 0
    for override in overrides:
        found = places_of_findings(partial(load_suite, path, [override]))
        assert found <= {f"override {override!r}".rstrip("'")}, found
        wrong += bool(found)
    assert wrong > 100


def test_a_list_of_paths_in_place_of_sets(tmp_path: Path) -> None:
    finding = only_finding(tmp_path, "evaluation: [a.jsonl, b.jsonl]\n")
    assert finding == (
        "run.yaml:11: evaluation.sets: expected a block of settings with name and path, got 'a.jsonl'"
    )


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("steps=0", "steps must be > 0, got 0"),
        ("parallel.ranks=0", "parallel.ranks must be > 0, got 0"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel needs parallel.tensor > 1"),
        ("data.max_prompt_tokens=0", "data.max_prompt_tokens must be > 0, got 0"),
        ("data.prompts.weight=0", "train.jsonl: weight must be > 0"),
    ],
)
def test_rules_of_a_block_name_the_setting_in_full(tmp_path: Path, override: str, finding: str) -> None:
    assert only_finding(tmp_path, "", override).startswith(f"override '{override}': ")
    assert finding in only_finding(tmp_path, "", override)
