"""The first checks to run on a GPU: the same CHORD step, in the layer spec that the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_chord.config import ObjectiveConfig
from megatron_chord.losses.logprobs import token_logprobs
from tests.distributed import steps
from tests.support.ranks import run_ranks
from tests.support.tiny import make_samples, reference_step, save_qwen2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RELATIVE = 5e-3
"""Transformer Engine multiplies fp32 matrices in TF32 (10 bits of mantissa)."""


def test_one_step_equals_float64_transformers(tmp_path: Path) -> None:
    folder, samples, objective = save_qwen2(tmp_path), make_samples(), ObjectiveConfig(entropy_bonus=0.01)
    expected, expected_grads = reference_step(folder, samples, 0.3, objective)
    cases = [
        {"samples": samples, "mu": 0.3, "objective": objective, "max_tokens": max_tokens}
        for max_tokens in (10_000, 40)
    ]
    (results,) = run_ranks(steps.chord_steps, 1, folder, cases)
    for metrics, grads in results:
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=RELATIVE)
        for name, grad in expected_grads.items():
            error = (grads[name].double().cpu() - grad).abs().max().item()
            assert error <= RELATIVE * grad.abs().max().item(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_equals_log_softmax(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 128, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(5000, 128, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(5000, (300,), device="cuda")
    logprobs, entropy = token_logprobs(hidden, weight, targets, chunk=64)
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
