"""SFT-then-RL in one run equals two runs bit for bit. Schedules and methods with a memory resume exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config_io import load_config
from megatron_chord.rollout.server import RolloutServer
from tests.support.few_rows import with_few_rows
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

COMMON = ROOT / "examples" / "methods" / "common.yaml"
SMALL = {
    "steps": "4",
    "batch.prompts": "4",
    "batch.rollouts": "4",
    "batch.demonstrations": "6",
    "data.evaluation": "null",
    "optim.warmup_steps": "0",
    "reward.workers": "1",
    "checkpoint.every": "2",
    "checkpoint.keep": "5",
}
SFT, GRPO = {"method.mu": "{peak: 1}"}, {"method.mu": "{peak: 0}"}
BINARY = {"method.mu": "{schedule: binary, switch_step: 2}"}
pytestmark = pytest.mark.usefixtures("server_key")


def train_in_turn(url: str, runs: list[tuple[Path, dict[str, str], Any]]) -> None:
    """Train each run, given as (output folder, settings, resume)."""
    from megatron_chord.train.loop import train

    for output, settings, resume in runs:
        wanted = {**SMALL, "rollout.servers": f"[{url}]", **settings, "output": str(output)}
        train(
            with_few_rows(load_config(COMMON, [f"{name}={value}" for name, value in wanted.items()])),
            resume=resume,
            allow_changed=True,
        )


def numbers(folder: Path, *but: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "tflops_per_gpu", "mfu", *but)}
        for row in metrics_of(folder)
    ]


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


def test_binary_mu_is_an_sft_run_and_then_a_grpo_run(server: RolloutServer, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [
        (one, BINARY, "never"),
        (two, {**SFT, "steps": "2"}, "never"),
        (two, GRPO, "auto"),
    ]
    run_ranks(train_in_turn, 1, server.url, runs)
    assert numbers(one) == numbers(two)
    assert weights(one) == weights(two)
    sft, rl = metrics_of(one)[1], metrics_of(one)[2]
    assert "policy_loss" not in sft, "a step of mu 1 samples nothing"
    assert "sft_loss" not in rl, "a step of mu 0 has no SFT pass"


def test_with_a_reset_the_second_stage_is_a_run_of_its_own(server: RolloutServer, tmp_path: Path) -> None:
    """The first stage's learning rate depends on the length of the run, so the stage is resumed from the long run."""
    one, resumed, exported, second = (tmp_path / name for name in ("one", "resumed", "exported", "second"))
    rates = {"optim.schedule": "cosine", "optim.warmup_steps": "1", "optim.weight_decay": "0.1"}
    binary = {**rates, "method.mu": "{schedule: binary, switch_step: 2, reset_optimizer: true}"}
    run_ranks(train_in_turn, 1, server.url, [(one, binary, "never")])
    for folder in (resumed, exported):
        shutil.copytree(one, folder)
        shutil.rmtree(folder / "checkpoints" / "step-000004")
    stage = {**GRPO, **rates, "steps": "2", "model.path": str(exported / "policy")}
    runs = [
        (resumed, binary, "auto"),
        (exported, {**binary, "steps": "2", **SFT}, "auto"),
        (second, stage, "never"),
    ]
    run_ranks(train_in_turn, 1, server.url, runs)
    assert numbers(resumed) == numbers(one)
    drop = ("step", "weight_version", "demonstration_epochs")
    assert numbers(one, *drop)[2:] == numbers(second, *drop)
    assert weights(one) == weights(second)


@pytest.mark.parametrize(
    "settings",
    [
        {"method.mu": "{schedule: gradient_norm, warmup_steps: 1}", "seed": "5"},
        {"method.mu": "{schedule: reward_adaptive, tau: 0.9}"},
        {
            "method": "{name: remix, mix_steps: 4, stale_share: 0.6}",
            "batch.demonstrations": "0",
            "batch.epochs": "2",
        },
        {  # an SFT update after every step
            "method": "{name: relift, size: 1, sft_lr: 1.0e-3}",
            "data.demonstrations": str(ROOT / "examples" / "arithmetic" / "demonstrations_aligned.jsonl"),
            "data.aligned": "true",
            "batch.demonstrations": "0",
        },
        {
            "method": "{name: self_distillation, shows: demonstration, teacher: averaged, teacher_rate: 0.3}",
            "method.teacher_prompt_tokens": "256",
            "data.demonstrations": str(ROOT / "examples" / "arithmetic" / "demonstrations_aligned.jsonl"),
            "data.aligned": "true",
            "batch.demonstrations": "0",
        },
    ],
    ids=["gradient_norm", "reward_adaptive", "remix", "relift", "averaged_teacher"],
)
def test_schedules_with_a_state_resume_exactly(
    server: RolloutServer, tmp_path: Path, settings: dict[str, str]
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks(train_in_turn, 1, server.url, [(straight, settings, "never")])
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    run_ranks(train_in_turn, 1, server.url, [(resumed, settings, "auto")])
    assert numbers(resumed) == numbers(straight)
    assert weights(resumed) == weights(straight)
