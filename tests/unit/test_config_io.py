from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.config_io import ConfigError, dump_config, load_config

GOOD = """\
output: runs/x
steps: 20
model:
  path: policy
data:
  prompts: train.jsonl
  experts: experts.jsonl
batch: {prompts: 4, rollouts: 8, experts: 16}
optim:
  lr: 1e-6
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_values_paths_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = load_config(
        path, ["optim.beta2=0.95", "objective.mu.peak=0.3", "data.experts=other.jsonl", "model.dtype=fp32"]
    )
    assert config.optim.lr == 1e-6
    assert config.optim.beta2 == 0.95
    assert config.objective.mu.peak == 0.3
    assert config.model.path == tmp_path / "policy"
    assert config.data.experts == Path("other.jsonl")
    assert config.output == Path("runs/x")


def test_dump_reads_back_to_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), [f"output={tmp_path / 'out'}"])
    again = write(tmp_path, dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (("optim:", "optimm:"), "run.yaml:9: unknown setting 'optimm'; did you mean optim?"),
        (("  lr: 1e-6", "  lrr: 1e-6"), "run.yaml:10: unknown setting 'optim.lrr'; did you mean optim.lr?"),
        (("  lr: 1e-6", "  lr: fast"), "run.yaml:10: optim.lr: expected float, got 'fast'"),
        (("  lr: 1e-6", "  lr: -1"), "run.yaml:10: optim.lr must be > 0, got -1.0"),
        (("steps: 20\n", ""), "run.yaml:1: steps is missing"),
        (("steps: 20", "steps: many"), "run.yaml:2: steps: expected int, got 'many'"),
        (
            ("  path: policy", "  path: policy\n  dtype: int8"),
            "run.yaml:5: model.dtype: 'int8' is none of fp32, bf16",
        ),
        (("rollouts: 8", "rollouts: 1"), "batch.rollouts must be >= 2"),
        (("  experts: experts.jsonl\n", ""), "mu is above 0 but data.experts is not given"),
        (("model:\n  path: policy", "model: policy"), "run.yaml:3: model.: expected a block of settings"),
        (("steps: 20", "steps: 20\nsteps: 30"), "run.yaml:3: steps is set twice"),
        (("steps: 20", "steps: [20"), "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], finding: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, GOOD.replace(*change)))
    assert finding in str(error.value)


def test_all_findings_come_together(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 20", "steps: many").replace("  lr: 1e-6", "  lrr: 1e-6")
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), ["objective.my.peak=1", "nonsense"])
    assert len(str(error.value).splitlines()) == 4
    assert (
        "override 'objective.my.peak=1': unknown setting 'objective.my'; did you mean objective.mu?"
        in str(error.value)
    )
