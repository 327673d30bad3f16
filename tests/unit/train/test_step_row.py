"""The row of metrics of one step, from numbers written here by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_chord.costs.flops import train_flops
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.step import Trained
from megatron_chord.train.step_row import speed_row, step_row
from megatron_chord.train.update import Update, UpdateResult
from tests.support.published import shape_of

INPUTS = StepInputs(
    updates=(
        Update(weights={"policy": 0.75, "sft": 0.25}, counts={"policy": 7, "sft": 2}),
        Update(weights={"policy": 0.75, "sft": 0.25}, counts={"policy": 5}),
    ),
    mu=0.25,
    stats={"reward_mean": 0.5},
    seconds={"sample": 3.0},
    num_tokens=100,
    squared_tokens=1000,
    weight_version=4,
)


def trained(**means: float) -> Trained:
    return Trained(
        result=UpdateResult(
            loss=1.5, means=means, maxima={"logprob_gap_max": 0.125}, compared={"tokens": 12.0}
        ),
        grad_norm=None,
        learning_rate=1e-3,
        num_skipped=1,
        zero_gradient=0.5,
        grad_norm_ratio=None,
    )


def test_tokens_are_counted_over_all_updates_and_missing_numbers_have_no_column() -> None:
    row = step_row(4, INPUTS, trained(entropy=0.25), terms=("policy", "sft"), num_micro_batches=3)
    assert row == {
        "step": 4,
        "mu": 0.25,
        "loss": 1.5,
        "entropy": 0.25,
        "logprob_gap_max": 0.125,
        "compared_tokens": 12,
        "num_policy_tokens": 12,
        "num_sft_tokens": 2,
        "reward_mean": 0.5,
        "zero_gradient": 0.5,
        "skipped_updates": 1,
        "learning_rate": 1e-3,
        "weight_version": 4,
        "micro_batches": 3,
    }


def test_numbers_that_are_not_finite_are_named_and_left_out() -> None:
    row = step_row(
        4, INPUTS, trained(entropy=math.nan, policy_loss=2.0), terms=("policy",), num_micro_batches=1
    )
    assert row["not_finite"] == ["entropy"]
    assert "entropy" not in row
    assert row["policy_loss"] == 2.0


def test_speed_counts_every_pass_of_the_step() -> None:
    shape = shape_of("qwen2.5-7b")
    term: Any = SimpleNamespace(scored=())
    context: Any = SimpleNamespace(
        state=SimpleNamespace(groups=SimpleNamespace(world_size=2), shape=shape),
        terms={"policy": term, "sft": term},
        run=SimpleNamespace(batch=SimpleNamespace(epochs=3)),
        engine=SimpleNamespace(take_sync_seconds=lambda: 0.5),
    )
    row = speed_row(context, INPUTS, {"total": 8.0, "train": 4.0})
    assert row["tokens_per_s"] == 12.5
    assert row["seconds"] == {"total": 8.0, "train": 4.0, "sync": 0.5}
    # 3 epochs of forward and backward over 100 tokens with a mean length of 10, in 4 s, on 2 ranks.
    assert row["tflops_per_gpu"] == pytest.approx(3 * 100 * train_flops(shape, 10.0) / 4 / 2 / 1e12)
