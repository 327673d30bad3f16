"""The first checks to run on a GPU: one CHORD step is right in the layer spec that the machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config_methods import EntropyTopWeight, MarginWeight
from megatron_chord.losses.logprobs import token_logprobs
from megatron_chord.model import build, specs
from tests.distributed import steps
from tests.distributed.splits import assert_split_invariant, case
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, save_model, save_qwen2, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RELATIVE = 5e-3
"""Transformer Engine multiplies FP32 matrices in TF32, which has 10 bits of mantissa."""
SEQUENCES = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]

OBJECTIVES: dict[str, dict[str, Any]] = {
    "chord": {"entropy_bonus": 0.01},
    "gspo, margin": {"surrogate": "gspo", "token_weight": MarginWeight()},
    "cispo, entropy top": {"surrogate": "cispo", "token_weight": EntropyTopWeight(share=0.3)},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_equals_float64_transformers(tmp_path: Path, name: str) -> None:
    folder = save_qwen2(tmp_path)
    run = tiny_run(folder, **OBJECTIVES[name])
    token_weight = run.method.token_weight
    terms = {"policy": policy_term(run.objective), "sft": sft_term(token_weight)}
    objective = (run, make_samples(), {"policy": 0.7, "sft": 0.3}, terms)
    assert_split_invariant(folder, {name: objective}, layouts={1: {"one": {}}}, relative=RELATIVE)


def updates_by_spec(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Compute the same update and its sequences' logits with Transformer Engine's layers and with Megatron's local
    layers."""
    results = {}
    for spec in ("te", "local"):
        for module in (build, specs):
            module.has_transformer_engine = lambda spec=spec: spec == "te"
        (update,) = steps.updates(folder, [case])
        ((first, second),) = steps.packed_logits(folder, [{}], SEQUENCES)
        results[spec] = {"update": update, "logits": [first, second]}
    return results


@pytest.mark.skipif(not specs.has_transformer_engine(), reason="needs Transformer Engine")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_transformer_engine_equals_the_local_spec(tmp_path: Path, family: str) -> None:
    folder = save_model(family, tmp_path)
    run = tiny_run(folder)
    (results,) = run_ranks(updates_by_spec, 1, folder, case(run, make_samples(), {"policy": 0.7, "sft": 0.3}))
    engine, local = results["te"], results["local"]
    for ours, theirs in zip(engine["logits"], local["logits"], strict=True):
        assert relative_error(ours, theirs) < RELATIVE
    (metrics, grads), (wanted, wanted_grads) = engine["update"], local["update"]
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=RELATIVE)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        assert relative_error(grads[name], grad) < 4 * RELATIVE, name


def logits_twice(folder: Path) -> list[bool]:
    """Compute the same packs twice. Return, for each pack, whether all bits of its logits are equal."""
    packs = [[[(7 * i + j) % 190 + 3 for i in range(60)] for j in range(8)], SEQUENCES]
    equal = []
    for pack in packs:
        (first,), (second,) = (steps.packed_logits(folder, [{}], pack) for _ in range(2))
        equal.append(all(torch.equal(one, other) for one, other in zip(first, second, strict=True)))
    return equal


@pytest.mark.skipif(not specs.has_transformer_engine(), reason="needs Transformer Engine")
def test_a_mixture_of_experts_computes_the_same_bits_twice(tmp_path: Path) -> None:
    """Without ``moe_permute_fusion`` the sum over a token's experts has another order in each run."""
    ((same, also_same),) = run_ranks(logits_twice, 1, save_model("qwen3_moe", tmp_path))
    assert same
    assert also_same


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_equals_log_softmax(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 128, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(5000, 128, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(5000, (300,), device="cuda")
    logprobs, entropy, *_ = token_logprobs(hidden, weight, targets, chunk=64)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()

    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    full = torch.log_softmax(exact_hidden @ exact_weight.t(), dim=-1)
    exact = full.gather(1, targets[:, None])[:, 0]
    (exact.sum() - 0.1 * (full.exp() * full).sum()).backward()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(logprobs.double(), exact, rtol=tolerance, atol=10 * tolerance)
    for ours, theirs in ((hidden, exact_hidden), (weight, exact_weight)):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < tolerance
