from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megatron_chord import config, schedules
from megatron_chord.config import RunConfig
from megatron_chord.config_io import ConfigError, dump_config, load_config

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


def write(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(tmp_path: Path, more: str = "", *overrides: str) -> RunConfig:
    return load_config(write(tmp_path, GOOD + more), overrides)


def findings(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value).replace(f"{path.parent}/", "").splitlines()


def only_finding(tmp_path: Path, more: str, *overrides: str) -> str:
    (finding,) = findings(write(tmp_path, GOOD + more), *overrides)
    return finding


def test_values_paths_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    run = load_config(
        path,
        ["optim.beta2=0.95", "objective.mu.peak=0.3", "data.demonstrations=other.jsonl", "model.dtype=fp32"],
    )
    assert run.optim == config.OptimConfig(lr=1e-6, beta2=0.95)
    assert run.objective.mu == schedules.Constant(peak=0.3)
    assert run.model.path == tmp_path / "policy"
    assert run.data.demonstrations == Path("other.jsonl")
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
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], finding: str) -> None:
    assert change[0] in GOOD
    assert finding in findings(write(tmp_path, GOOD.replace(*change)))[0]


def test_all_findings_come_together(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 20", "steps: many").replace("  lr: 1e-6", "  lrr: 1e-6")
    found = findings(write(tmp_path, text), "objective.my.peak=1", "nonsense")
    assert len(found) == 4
    assert (
        "override 'objective.my.peak=1': unknown setting 'objective.my'; did you mean objective.mu?" in found
    )


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert findings(write(tmp_path, text)) == ["run.yaml: expected a mapping of settings"]


class TestBlocksOfSeveralKinds:
    """``objective.mu`` and ``objective.token_weight``."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("mu: {schedule: constant, peak: 0.5}", schedules.Constant(peak=0.5)),
            ("mu: {peak: 0.5}", schedules.Constant(peak=0.5)),
            ("mu: {}", schedules.Constant()),
            ("mu: constant", schedules.Constant()),
            ("mu: 'constant'", schedules.Constant()),
            ("mu: periodic", schedules.Periodic()),
            ("mu: {peak: 0.9, valley: 0, schedule: linear}", schedules.Linear(peak=0.9, valley=0.0)),
            ("mu: null", None),
            ("mu:", None),
            ("token_weight: phi", config.SimpleWeight(kind="phi")),
            ("token_weight: {kind: p}", config.SimpleWeight(kind="p")),
            ("token_weight: {kind: power, a: 2}", config.PowerWeight(a=2.0)),
            ("token_weight: power", config.PowerWeight()),
            ("token_weight: ~", None),
            ("kl: null", None),
            ("kl: {}", config.KLConfig()),
        ],
    )
    def test_the_naming_key_chooses(self, tmp_path: Path, text: str, expected: Any) -> None:
        objective = load(tmp_path, f"objective:\n  {text}\n").objective
        assert getattr(objective, text.partition(":")[0]) == expected

    @pytest.mark.parametrize("kind", [*get_args(schedules.MuSchedule), *get_args(config.TokenWeight)])
    def test_every_kind_is_reached_and_dumped(self, tmp_path: Path, kind: type) -> None:
        settings: dict[str, Any] = {
            field.name: {"kind": "one"}.get(field.name, 1)
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING
        }
        value = kind(**settings, **({"rate": 0.1} if kind is schedules.Learned else {}))
        name = "token_weight" if hasattr(value, "kind") else "mu"
        block = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
        path = write(tmp_path, GOOD + yaml.safe_dump({"objective": {name: block}}))
        run = load_config(path, [f"output={tmp_path}"])
        assert getattr(run.objective, name) == value
        assert load_config(write(tmp_path, dump_config(run))) == run

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            (
                "mu: {schedule: warmup_cosin}",
                f"run.yaml:12: objective.mu.schedule: 'warmup_cosin' is none of {', '.join(SCHEDULES)}; did you mean "
                "warmup_cosine?",
            ),
            ("mu: binry", "run.yaml:12: objective.mu.schedule: 'binry' is none of constant"),
            ("mu: {schedule: null}", "run.yaml:12: objective.mu.schedule: '"),
            (
                "mu: {schedule: [linear]}",
                "run.yaml:12: objective.mu.schedule: expected a single value, got a list",
            ),
            ("mu: [linear]", "run.yaml:12: objective.mu: expected a block of settings, got a list"),
            ("mu: binary", "run.yaml:12: objective.mu.switch_step is missing"),
            (
                "token_weight: {a: 2}",
                "run.yaml:12: objective.token_weight.kind is missing; known: one, p, phi, power, clipped_is, focal, "
                "bernoulli_entropy, entropy_top, entropy_norm, margin",
            ),
            (
                "token_weight: {kind: phi, a: 2}",
                "run.yaml:12: unknown setting 'objective.token_weight.a'; known with `kind: phi`: kind",
            ),
            (
                "mu: {schedule: binary, switch_stp: 1, switch_step: 1}",
                "run.yaml:12: unknown setting 'objective.mu.switch_stp'; known with `schedule: binary`: schedule, "
                "switch_step, reset_optimizer; did you mean objective.mu.switch_step?",
            ),
            (
                "mu: {decay_steps: 3}",
                "unknown setting 'objective.mu.decay_steps'; known with `schedule: constant`: schedule, peak",
            ),
            (
                "mu: {schedule: linear, schedule: linear, peak: 1, valley: 0}",
                "objective.mu.schedule is set twice",
            ),
            ("mu:\n    peak: 2", "run.yaml:13: mu.peak must lie in [0, 1], got 2.0"),
            ("kl: k3", "run.yaml:12: objective.kl: expected a block of settings, got 'k3'"),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, text: str, finding: str) -> None:
        assert finding in only_finding(tmp_path, f"objective:\n  {text}\n")

    def test_kind_and_schedule_of_other_blocks_choose_nothing(self, tmp_path: Path) -> None:
        run = load(tmp_path, "  schedule: cosine\nreward: {kind: exact, workers: 3}\n")
        assert run.optim == config.OptimConfig(lr=1e-6, schedule="cosine")
        assert run.reward == config.RewardConfig(kind="exact", workers=3)
        assert "block of settings" in only_finding(tmp_path, "reward: exact\n")


class TestMethod:
    @pytest.mark.parametrize(
        ("text", "name", "settings"),
        [
            ("", "chord", {}),
            ("method: luffy", "luffy", {}),
            ("method: {name: luffy}", "luffy", {}),
            ("method: {gamma: 0.1}", "chord", {"gamma": 0.1}),
            (
                "method: {a: 1, name: luffy, b: 1e-6, c: true, d: word, e: '1e-6', f: '5', g: 1.0e6, h: ''}",
                "luffy",
                {"a": 1, "b": 1e-6, "c": True, "d": "word", "e": "1e-6", "f": "5", "g": 1e6, "h": ""},
            ),
        ],
    )
    def test_all_keys_but_name_are_the_method_s_own(
        self, tmp_path: Path, text: str, name: str, settings: dict[str, Any]
    ) -> None:
        method = load(tmp_path, text).method
        assert method == config.MethodConfig(name=name, settings=settings)
        assert [type(value) for value in method.settings.values()] == [
            type(value) for value in settings.values()
        ]

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            (
                "{name: luffy, gamma: [1]}",
                "method.gamma: expected a single number, text, true or false, got a list",
            ),
            ("{name: luffy, settings: {gamma: 1}}", "method.settings: expected a single number"),
            ("{gamma: null}", "method.gamma: expected a single number"),
            ("{gamma: 2020-01-01}", "method.gamma: expected a single number"),
            ("{gamma: 2020-13-41}", "method.gamma: expected a single number"),
            ("{gamma: !odd 1}", "method.gamma: expected a single number"),
            ("{gamma: 1, gamma: 2}", "method.gamma is set twice"),
            ("{name: [a]}", "method.name: expected a single value, got a list"),
            ("null", "method: expected a block of settings"),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, text: str, finding: str) -> None:
        assert f"run.yaml:11: {finding}" in only_finding(tmp_path, f"method: {text}\n")

    def test_the_dump_is_flat(self, tmp_path: Path) -> None:
        dumped = yaml.safe_load(dump_config(load(tmp_path, "method: {name: luffy, gamma: 0.1}\n")))
        assert dumped["method"] == {"name": "luffy", "gamma": 0.1}


class TestDump:
    def test_reads_back_to_the_same(self, tmp_path: Path) -> None:
        objective = config.ObjectiveConfig(
            mu=schedules.WarmupCosine(peak=0.9, valley=0.05, decay_steps=200),
            token_weight=config.MarginWeight(width=0.3),
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
            model=config.ModelConfig(path=tmp_path / "p", megatron_overrides={**numbers, "text": "1e-6"}),
            data=config.DataConfig(prompts=tmp_path / "x", system_prompt="null"),
            batch=config.BatchConfig(prompts=1, rollouts=2, demonstrations=0),
            method=config.MethodConfig(
                name="1e-6", settings={**{f"t{index}": text for index, text in enumerate(texts)}, **numbers}
            ),
            objective=objective,
            reward=config.RewardConfig(answer_marker=" "),
            rollout=config.RolloutConfig(servers=("http://a:1", "1e5")),
        )
        again = load_config(write(tmp_path / "other", dump_config(run)))
        assert again == run
        assert [type(value) for value in again.method.settings.values()] == [
            type(value) for value in run.method.settings.values()
        ]

    def test_of_a_run_with_defaults_only(self, tmp_path: Path) -> None:
        run = load(tmp_path, "", f"output={tmp_path / 'out'}")
        dumped = yaml.safe_load(dump_config(run))
        assert dumped["objective"]["mu"] is None
        assert dumped["objective"]["kl"] is None
        assert dumped["method"] == {"name": "chord"}
        assert load_config(write(tmp_path, dump_config(run))) == run


class TestOverrides:
    FILE = "objective:\n  mu: {schedule: linear, peak: 0.9, valley: 0.1, decay_steps: 5}\n  token_weight: power\n"

    @pytest.mark.parametrize(
        ("method", "overrides", "expected"),
        [
            ("luffy", ["method.gamma=0.2"], ("luffy", {"gamma": 0.2})),
            ("luffy", ["method.gamma=0.2", "method.on=true"], ("luffy", {"gamma": 0.2, "on": True})),
            ("{name: luffy, gamma: 0.1}", ["method.gamma=1e-6"], ("luffy", {"gamma": 1e-6})),
            ("{name: luffy, gamma: 0.1}", ["method.name=grpo"], ("grpo", {"gamma": 0.1})),
            ("{name: luffy, gamma: 0.1}", ["method=grpo"], ("grpo", {})),
            ("{name: luffy, gamma: 0.1}", ["method={name: grpo, beta: 1}"], ("grpo", {"beta": 1})),
            ("chord", ["method=luffy", "method.gamma=0.2"], ("luffy", {"gamma": 0.2})),
        ],
    )
    def test_of_the_method(
        self, tmp_path: Path, method: str, overrides: list[str], expected: tuple[str, dict[str, Any]]
    ) -> None:
        run = load(tmp_path, f"method: {method}\n", *overrides)
        assert (run.method.name, run.method.settings) == expected

    @pytest.mark.parametrize(
        ("overrides", "mu"),
        [
            (["objective.mu.peak=0"], schedules.Linear(peak=0.0, valley=0.1, decay_steps=5)),
            (
                ["objective.mu.schedule=warmup_cosine"],
                schedules.WarmupCosine(peak=0.9, valley=0.1, decay_steps=5),
            ),
            (["objective.mu=constant"], schedules.Constant()),
            (["objective.mu=constant", "objective.mu.peak=0"], schedules.Constant(peak=0.0)),
            (["objective.mu={schedule: binary, switch_step: 3}"], schedules.Binary(switch_step=3)),
            (["objective.mu="], None),
            (["objective.mu=null", "objective.mu.peak=0.2"], schedules.Constant(peak=0.2)),
        ],
    )
    def test_of_mu(self, tmp_path: Path, overrides: list[str], mu: Any) -> None:
        assert load(tmp_path, self.FILE, *overrides).objective.mu == mu

    def test_below_a_block_s_single_value(self, tmp_path: Path) -> None:
        run = load(tmp_path, self.FILE, "objective.token_weight.a=3")
        assert run.objective.token_weight == config.PowerWeight(a=3.0)
        run = load(tmp_path, self.FILE, "objective.token_weight=phi")
        assert run.objective.token_weight == config.SimpleWeight(kind="phi")

    def test_of_blocks_that_are_not_in_the_file(self, tmp_path: Path) -> None:
        run = load(tmp_path, "", "objective.kl.coefficient=0.1", "model.megatron_overrides.x=1e-3", "seed=3")
        assert run.objective.kl == config.KLConfig(coefficient=0.1)
        assert run.model.megatron_overrides == {"x": 1e-3}
        assert run.seed == 3

    @pytest.mark.parametrize(
        ("override", "finding"),
        [
            ("objective.mu.schedule=constant", "run.yaml:12: unknown setting 'objective.mu.valley'"),
            (
                "objective.mu.schedule=no",
                "override 'objective.mu.schedule=no': objective.mu.schedule: 'no' is none of",
            ),
            ("objective.mu=no", "override 'objective.mu=no': objective.mu.schedule: 'no' is none of"),
            (
                "objective.mu.peak=[1]",
                "override 'objective.mu.peak=[1]': objective.mu.peak: expected a single value",
            ),
            (
                "objective.kl.coefficient=0",
                "override 'objective.kl.coefficient=0': objective.kl.coefficient must be > 0",
            ),
            ("steps.x=1", "override 'steps.x=1': steps: expected a single value, got a mapping"),
            ("steps", "override 'steps': expected name=value"),
            ("=1", "override '=1': expected name=value"),
            ("base=b.yaml", "override 'base=b.yaml': a base is named in a file only"),
        ],
    )
    def test_what_is_wrong(self, tmp_path: Path, override: str, finding: str) -> None:
        assert finding in findings(write(tmp_path, GOOD + self.FILE), override)[0]

    def test_hide_no_setting_that_is_set_twice(self, tmp_path: Path) -> None:
        text = GOOD + "optim:\n  lr: 1\n"
        assert findings(write(tmp_path, text), "optim.lr=2") == ["run.yaml:11: optim is set twice"]

    def test_of_what_is_no_yaml_are_text(self, tmp_path: Path) -> None:
        assert load(tmp_path, "", "data.system_prompt=a: b: c").data.system_prompt == "a: b: c"


class TestBase:
    def test_settings_replace_the_base_s_key_by_key(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD + "reward: {kind: exact, workers: 3}\nrollout: {servers: [a, b]}\n", "base.yaml")
        run = load_config(
            write(
                tmp_path,
                "steps: 30\nbase: base.yaml\noptim: {schedule: cosine}\nreward: {kind: math}\n"
                "rollout: {servers: [c]}\n",
            )
        )
        assert run.steps == 30
        assert run.optim == config.OptimConfig(lr=1e-6, schedule="cosine")
        assert run.reward == config.RewardConfig(kind="math", workers=3)
        assert run.rollout.servers == ("c",)
        assert "base" not in yaml.safe_load(dump_config(run))

    @pytest.mark.parametrize(
        ("below", "own", "expected"),
        [
            ("{schedule: linear, peak: 1, valley: 0}", "{valley: 1}", schedules.Linear(peak=1.0, valley=1.0)),
            ("{schedule: constant, peak: 0.5}", "{schedule: constant}", schedules.Constant(peak=0.5)),
            ("{schedule: linear, peak: 1, valley: 0}", "periodic", schedules.Periodic()),
            ("{schedule: linear, peak: 1, valley: 0}", "null", None),
            ("periodic", "{sft_steps: 3}", schedules.Periodic(sft_steps=3)),
            ("null", "{peak: 0.3}", schedules.Constant(peak=0.3)),
        ],
    )
    def test_another_choice_replaces_the_whole_block(
        self, tmp_path: Path, below: str, own: str, expected: Any
    ) -> None:
        write(tmp_path, GOOD + f"objective: {{clip_high: 0.3, mu: {below}}}\n", "base.yaml")
        run = load_config(write(tmp_path, f"base: base.yaml\nobjective: {{mu: {own}}}\n"))
        assert run.objective == config.ObjectiveConfig(clip_high=0.3, mu=expected)

    @pytest.mark.parametrize(
        ("below", "own", "expected"),
        [
            ("{name: luffy, gamma: 1}", "{name: luffy, beta: 2}", ("luffy", {"gamma": 1, "beta": 2})),
            ("{name: luffy, gamma: 1}", "{name: grpo, beta: 2}", ("grpo", {"beta": 2})),
            ("{name: luffy, gamma: 1}", "{beta: 2}", ("luffy", {"gamma": 1, "beta": 2})),
            ("{name: luffy, gamma: 1}", "grpo", ("grpo", {})),
            ("luffy", "{beta: 2}", ("luffy", {"beta": 2})),
        ],
    )
    def test_of_the_method(
        self, tmp_path: Path, below: str, own: str, expected: tuple[str, dict[str, Any]]
    ) -> None:
        write(tmp_path, GOOD + f"method: {below}\n", "base.yaml")
        run = load_config(write(tmp_path, f"base: base.yaml\nmethod: {own}\n"))
        assert (run.method.name, run.method.settings) == expected

    def test_free_mappings_merge_and_overrides_come_last(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD, "base.yaml")
        write(tmp_path, "base: base.yaml\nmodel: {megatron_overrides: {a: 1, b: 1}}\n", "middle.yaml")
        run = load_config(
            write(tmp_path, "base: middle.yaml\nmodel: {megatron_overrides: {b: 2, c: 2}}\n"),
            ["model.megatron_overrides.c=3"],
        )
        assert run.model.megatron_overrides == {"a": 1, "b": 2, "c": 3}

    def test_paths_are_relative_to_the_file_that_has_them(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD, "low/base.yaml")
        write(tmp_path, "base: low/base.yaml\ndata: {evaluation: heldout.jsonl}\n", "middle.yaml")
        run = load_config(
            write(tmp_path, "base: ../middle.yaml\ndata: {demonstrations: e.jsonl}\n", "high/run.yaml")
        )
        resolved = {
            name: value.resolve() for name, value in vars(run.data).items() if isinstance(value, Path)
        }
        root = tmp_path.resolve()
        assert resolved == {
            "prompts": root / "low/train.jsonl",
            "demonstrations": root / "high/e.jsonl",
            "evaluation": root / "heldout.jsonl",
        }
        assert run.output == Path("runs/x")

    def test_every_finding_names_its_own_file_and_line(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD + "reward: {knid: exact}\nsteps: 30\n", "base.yaml")
        text = "base: base.yaml\noptim:\n  lr: -1\nseed: x\n"
        assert sorted(findings(write(tmp_path, text), "optim.epss=1", "parallel.ranks=x")) == [
            "base.yaml:11: unknown setting 'reward.knid'; did you mean reward.kind?",
            "base.yaml:12: steps is set twice",
            "override 'optim.epss=1': unknown setting 'optim.epss'; did you mean optim.eps?",
            "override 'parallel.ranks=x': parallel.ranks: expected int, got 'x'",
            "run.yaml:4: seed: expected int, got 'x'",
        ]

    def test_a_broken_rule_is_told_at_the_block_of_the_upper_file(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD, "base.yaml")
        assert findings(write(tmp_path, "base: base.yaml\noptim:\n  min_lr: 1\n")) == [
            "run.yaml:3: optim.min_lr 1.0 is above optim.lr 1e-06"
        ]

    @pytest.mark.parametrize(
        ("text", "finding"),
        [
            ("steps: 1\nbase: none.yaml\n", "run.yaml:2: base: none.yaml: cannot be read: "),
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
        write(tmp_path, "- 1\n", "list.yaml")
        write(tmp_path, "steps: 1\n]\n", "bad.yaml")
        write(tmp_path, "base: b.yaml\n", "a.yaml")
        write(tmp_path, "steps: 1\nbase: run.yaml\n", "b.yaml")
        (found,) = findings(write(tmp_path, text))
        assert found.startswith(finding.replace("./", ""))

    def test_one_base_may_be_reached_by_many(self, tmp_path: Path) -> None:
        write(tmp_path, GOOD, "base.yaml")
        for name in ("a.yaml", "b.yaml"):
            assert load_config(write(tmp_path, "base: base.yaml\n", name)).steps == 20


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("rollout: {lag: -1}", "rollout.lag must be >= 0, got -1"),
        ("rollout: {lag: 2}", "rollout.lag 2 with rollout.in_flight: drain would only make rollouts older"),
        ("rollout: {in_flight: keep}", "rollout.in_flight means nothing without rollout.lag"),
        (
            "rollout: {repeatable: true, servers: ['http://127.0.0.1:1']}",
            "start them with VLLM_BATCH_INVARIANT=1",
        ),
        ("rollout: {repeatable: true, lag: 1, in_flight: keep}", "set in_flight to drain"),
        ("rollout: {repeatable: true, extra_prompts: 0.5}", "which prompts finish first is chance"),
        (
            "objective: {ratio_from: current, correction: {mode: none}}",
            "objective.correction.mode none turns off the correction that rollout.lag, rollout.extra_prompts with",
        ),
        (
            "rollout: {lag: 1}\nobjective: {ratio_from: current, correction: {mode: none, high: 3}}",
            "objective.correction.mode none has no weight",
        ),
        (
            "rollout: {lag: 1}\nobjective: {correction: {mode: none}}",
            "objective.correction and ratio_from: rollout would correct the same mismatch twice",
        ),
    ],
)
def test_a_lag_and_what_goes_with_it(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, f"{text}\n")


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("rollout: {extra_prompts: -0.5}", "rollout.extra_prompts must be >= 0, got -0.5"),
        ("rollout: {extra_prompts: 25}", "must lie in [0, 4], got 25.0: it is a share of the step's prompts"),
        ("rollout: {unfinished: drop}", "rollout.unfinished means nothing without rollout.extra_prompts"),
        ("rollout: {extra_prompts: 0.2, unfinished: keep}", "unfinished"),
        ("rollout: {extra_prompts: 0.2, max_carries: 0}", "rollout.max_carries must be > 0, got 0"),
        ("rollout: {max_carries: 1}", "rollout.max_carries means nothing without rollout.extra_prompts"),
        (
            "rollout: {extra_prompts: 0.2, unfinished: drop, max_carries: 1}",
            "rollout.max_carries means nothing without rollout.extra_prompts and unfinished: carry",
        ),
        (
            "rollout: {extra_prompts: 0.2, unfinished: drop}\n"
            "objective: {ratio_from: current, correction: {mode: none}}",
            "objective.correction.mode none turns off the correction",
        ),
    ],
)
def test_early_stop_and_what_goes_with_it(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in only_finding(tmp_path, f"{text}\n")


def test_a_temperature_that_vllm_refuses(tmp_path: Path) -> None:
    assert "rollout.temperature must be <= 2, got 3.0" in only_finding(
        tmp_path, "rollout: {temperature: 3}\n"
    )


@pytest.mark.parametrize(
    ("share", "count", "extra"),
    [(0.0, 16, 0), (0.25, 16, 4), (0.25, 17, 5), (0.1, 30, 3), (0.3, 10, 3), (0.01, 3, 1), (1.0, 7, 7)],
)
def test_extra_prompts_are_a_share_rounded_up(share: float, count: int, extra: int) -> None:
    assert config.RolloutConfig(extra_prompts=share).extra_of(count) == extra


def test_a_correction_that_is_turned_off(tmp_path: Path) -> None:
    run = load(tmp_path, "rollout: {lag: 1}\nobjective: {ratio_from: current, correction: {mode: none}}\n")
    assert run.objective.correction == config.CorrectionConfig(mode="none")


@pytest.mark.parametrize("precision", ["fp8_rollout", "fp8_e2e", "fp8_tensorwise"])
def test_fp8_is_one_line(tmp_path: Path, precision: str) -> None:
    run = load(tmp_path, f"precision: {precision}\n")
    without = load(tmp_path)
    assert run.precision == precision
    assert dataclasses.replace(run, precision=None) == without, "taking the line away is the way back to BF16"
    off = "objective: {ratio_from: current, correction: {mode: none}}\n"
    assert load(tmp_path, f"precision: {precision}\n{off}").objective.correction is not None


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("precision: fp8", "precision: 'fp8' is none of bf16, fp8_rollout, fp8_e2e, fp8_tensorwise"),
        (
            "precision: bf16\nobjective: {ratio_from: current, correction: {mode: none}}",
            "without any leave",
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
