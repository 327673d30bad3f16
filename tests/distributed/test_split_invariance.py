"""One CHORD step is the same step however it is split: against plain float64 Transformers, values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import ObjectiveConfig
from tests.distributed import steps
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, reference_step, save_qwen2

RELATIVE = 1e-5
MU = 0.3
OBJECTIVE = ObjectiveConfig(entropy_bonus=0.01)

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {},
        "cp2": {"context": 2},
    },
    4: {
        "tp2_pp2": {"tensor": 2, "pipeline": 2},
        "tp2_pp2_sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "tp2_dp2": {"tensor": 2},
        "pp2_dp2": {"pipeline": 2},
        "tp2_cp2_sp": {"tensor": 2, "context": 2, "sequence_parallel": True},
        "dp4": {},
    },
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp(request.param), tied=request.param == "tied")


def assert_same_step(result: Any, reference: Any, what: str) -> None:
    metrics, grads = result
    expected, expected_grads = reference
    assert metrics.keys() == expected.keys(), what
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=RELATIVE, abs=1e-9), f"{what}: {name}"
    assert grads.keys() == expected_grads.keys(), what
    for name, grad in expected_grads.items():
        scale = grad.abs().max().item()
        error = (grads[name].double() - grad).abs().max().item()
        assert error <= RELATIVE * scale + 1e-9, (
            f"{what}: gradient of {name} off by {error:.2e} of {scale:.2e}"
        )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_computes_the_reference_step(model: Path, world_size: int) -> None:
    samples = make_samples()
    cases, names = [], []
    for layout, parallel in LAYOUTS[world_size].items():
        # One micro-batch a rank, many of them, and another packing order.
        for split, variant in {
            "one": {"samples": samples},
            "many": {"samples": samples, "max_tokens": 30},
            "reversed": {"samples": samples[::-1], "max_tokens": 60},
        }.items():
            cases.append({"mu": MU, "objective": OBJECTIVE, "parallel": parallel, **variant})
            names.append(f"{layout}/{split}")
    reference = reference_step(model, samples, MU, OBJECTIVE)
    for rank_results in run_ranks(steps.chord_steps, world_size, model, cases):
        for name, result in zip(names, rank_results, strict=True):
            assert_same_step(result, reference, name)


@pytest.mark.parametrize(
    ("kinds", "world_size", "parallel"),
    [
        ({"num_policy": 0, "num_expert": 3}, 2, {}),
        ({"num_policy": 3, "num_expert": 0}, 2, {"pipeline": 2}),
        ({"num_policy": 1, "num_expert": 0}, 2, {}),
        ({"num_policy": 1, "num_expert": 1}, 4, {}),
    ],
    ids=["experts only", "rollouts only", "a rank with nothing", "ranks with one kind or nothing"],
)
def test_micro_batches_without_a_kind(
    model: Path, kinds: dict[str, int], world_size: int, parallel: dict[str, int]
) -> None:
    samples = make_samples(**kinds)
    reference = reference_step(model, samples, MU, OBJECTIVE)
    case = {"samples": samples, "mu": MU, "objective": OBJECTIVE, "parallel": parallel, "max_tokens": 30}
    for (result,) in run_ranks(steps.chord_steps, world_size, model, [case]):
        assert_same_step(result, reference, str(kinds))


def test_other_objectives_and_temperature(model: Path) -> None:
    samples = make_samples(seed=3)
    objectives = [
        ObjectiveConfig(expert_weight="one", clip_low=0.1, clip_high=0.28),
        ObjectiveConfig(expert_weight="p", ratio_from="current"),
    ]
    cases = [
        {"samples": samples, "mu": MU, "objective": objective, "temperature": 0.7, "max_tokens": 40}
        for objective in objectives
    ]
    (results,) = run_ranks(steps.chord_steps, 1, model, cases)
    for objective, result in zip(objectives, results, strict=True):
        assert_same_step(result, reference_step(model, samples, MU, objective, 0.7), str(objective))


def test_mu_0_is_grpo_and_mu_1_is_sft(model: Path) -> None:
    """Tokens of the other kind share the pass and add nothing (that they add an exact 0 is a test of the losses)."""
    samples = make_samples()
    cases = [{"samples": samples, "mu": mu} for mu in (0.0, 1.0)]
    (results,) = run_ranks(steps.chord_steps, 1, model, cases)
    for mu, kind, (metrics, grads) in zip((0.0, 1.0), ("policy", "expert"), results, strict=True):
        pure = [sample for sample in samples if sample.kind == kind]
        expected, expected_grads = reference_step(model, pure, mu, ObjectiveConfig())
        shared = {name: value for name, value in metrics.items() if name in expected}
        if kind == "expert":
            shared["logprob_gap_max"] = expected["logprob_gap_max"]
        assert_same_step((shared, grads), (expected, expected_grads), kind)
