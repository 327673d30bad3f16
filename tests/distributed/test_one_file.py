"""The distributed trainer computes what examples/one_file/chord.py says: loss, metrics and every gradient."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_chord.config_methods import SimpleWeight
from megatron_chord.losses.policy import group_advantages
from megatron_chord.records import TrainSample
from megatron_chord.schedules import ScheduleInput, WarmupCosine
from tests.distributed import steps
from tests.distributed.splits import LAYOUTS, assert_same_update, case, total, with_layout
from tests.support.ranks import ROOT, run_ranks
from tests.support.tiny import make_samples, save_qwen2, tiny_run

METHODS: dict[str, tuple[float, str]] = {
    "chord_mu": (0.7, "one"),
    "chord_phi": (0.3, "phi"),
    "grpo": (0.0, "phi"),
}
"""For each method: mu of the update, and the weight of a demonstration's token."""


@pytest.fixture(scope="module")
def one_file() -> Any:
    spec = importlib.util.spec_from_file_location("one_file_chord", ROOT / "examples/one_file/chord.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


def specified_update(one_file: Any, folder: Path, samples: Sequence[TrainSample], method: str) -> Any:
    """Compute loss, metrics and gradients with the one file, in float64. Names are the trainer's."""
    mu, weight = METHODS[method]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    rollouts, demonstrations = [], []
    for sample in samples:
        (part,) = sample.parts
        what = {"tokens": torch.tensor(sample.token_ids), "trained": torch.tensor(part.positions)}
        if part.term == "policy":
            old = torch.tensor(part.constants["rollout_logprob"], dtype=torch.float64)
            advantage = part.constants["advantage"]
            rollouts.append(one_file.Rollout(**what, old_logprobs=old, advantage=advantage))
        else:
            demonstrations.append(one_file.Demonstration(**what))
    loss, metrics = one_file.chord_loss(model, rollouts, demonstrations, mu=mu, token_weight=weight)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return metrics, grads


def samples_of(method: str) -> list[TrainSample]:
    return make_samples(seed=5, num_sft=0 if method == "grpo" else 5)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_computes_what_the_one_file_says(one_file: Any, tmp_path: Path, world_size: int) -> None:
    model = save_qwen2(tmp_path)
    expected = {name: specified_update(one_file, model, samples_of(name), name) for name in METHODS}
    cases, names = [], []
    for layout, parallel in LAYOUTS[world_size].items():
        for method, (mu, weight) in METHODS.items():
            run = tiny_run(model, token_weight=SimpleWeight(kind=weight))  # type: ignore[arg-type]
            run = with_layout(replace(run, batch=replace(run.batch, max_tokens_per_gpu=60)), parallel, 60)
            cases.append(case(run, samples_of(method), {"policy": 1 - mu, "sft": mu}))
            names.append((method, f"{method}/{layout}"))
    for rank, results in enumerate(run_ranks(steps.updates, world_size, model, cases)):
        for (method, what), result in zip(names, results, strict=True):
            assert (result[1] is None) == (rank > 0), what
            assert total(expected[method][1]) > 1e-3
            assert_same_update(result, expected[method], what)


def test_advantages_and_mu_are_the_trainers(one_file: Any) -> None:
    groups = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5], [0.0, 0.25, 3.0]]
    ours = group_advantages(groups, kind="group_std", eps=1e-6)
    assert [pytest.approx(one_file.group_advantages(group), rel=1e-12) for group in groups] == [
        list(advantages) for advantages in ours
    ]
    schedule = WarmupCosine(peak=0.9, valley=0.05, warmup_steps=0, decay_steps=40)
    for step in (0, 1, 13, 39, 40, 60):
        expected = one_file.cosine_mu(step, peak=0.9, valley=0.05, decay_steps=40)
        assert schedule.value(ScheduleInput(step=step)) == pytest.approx(expected, rel=1e-12)


def test_it_learns(one_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = one_file.train(one_file.METHODS["chord_phi"])
    assert after > before + 0.3, capsys.readouterr().out
