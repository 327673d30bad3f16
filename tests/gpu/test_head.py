"""The log-prob head on a GPU: Triton's kernels equal float64, and equal torch's sweeps at a real vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chord.losses import logit_kernels_torch
from megatron_chord.losses.logit_kernels import LogitKernels
from megatron_chord.losses.logprobs import kernels_for, token_logprobs
from tests.unit.losses.test_logit_kernels import CASES, assert_gradient, assert_reduced, sweep_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB = 151_936


def kernels() -> LogitKernels:
    from megatron_chord.losses import logit_kernels_triton

    return logit_kernels_triton


def test_kernels_are_what_runs_on_a_gpu() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert kernels_for(torch.empty(0, device="cuda", dtype=dtype)) is kernels()
    assert kernels_for(torch.empty(0, device="cuda", dtype=torch.float64)) is logit_kernels_torch
    assert kernels_for(torch.empty(0)) is logit_kernels_torch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compute_what_float64_does(case: dict[str, Any]) -> None:
    ours = sweep_shards(kernels(), case, device="cuda")
    assert_reduced(case, ours["reduced"])
    assert_gradient(case, ours["gradient"])


def inputs_on_gpu(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device="cuda").to(dtype).requires_grad_()
    weight = (3 * hidden**-0.5 * torch.randn(VOCAB, hidden, device="cuda")).to(dtype).requires_grad_()
    return states, weight, torch.randint(VOCAB, (tokens,), device="cuda")


def run(inputs: tuple[Tensor, Tensor, Tensor], kernels: LogitKernels | None, chunk: int) -> dict[str, Tensor]:
    hidden, weight, targets = inputs
    found = token_logprobs(hidden, weight, targets, temperature=0.7, chunk=chunk, rival=True, kernels=kernels)
    loss = found.logprobs.sum() + 0.1 * found.entropy.sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert found.rival is not None
    values = {"log-probs": found.logprobs, "entropy": found.entropy, "rival": found.rival}
    return values | {"hidden.grad": grads[0], "weight.grad": grads[1]}


@pytest.mark.parametrize("chunk", [100, 600])
def test_the_head_with_kernels_equals_that_with_torch(chunk: int) -> None:
    """From the same rounded BF16 logits, values agree to the last places of FP32 and gradients to a last place of
    BF16."""
    inputs = inputs_on_gpu(tokens=600, hidden=512, dtype=torch.bfloat16)
    ours, theirs = run(inputs, None, chunk), run(inputs, logit_kernels_torch, chunk)
    for name in ("log-probs", "entropy", "rival"):
        assert (ours[name] - theirs[name]).abs().max() < 1e-4, name
    for name in ("hidden.grad", "weight.grad"):
        assert (ours[name].double() - theirs[name].double()).norm() < 2**-8 * theirs[name].double().norm()


def test_more_logits_than_32_bits_can_count() -> None:
    """The last of 2.2e9 logits give the same results as in a matrix of their own."""
    tokens, last = 2**31 // VOCAB + 300, slice(-200, None)
    torch.manual_seed(0)
    logits = torch.empty(tokens, VOCAB, device="cuda", dtype=torch.bfloat16).normal_()
    rows = torch.randint(VOCAB, (tokens,), device="cuda")
    alone = logits[last].clone()
    whole, part = (
        kernels().reduce(logits, rows, 1.0, rival=True),
        kernels().reduce(alone, rows[last], 1.0, rival=True),
    )
    for value, expected in zip(whole, part, strict=True):
        assert value is not None
        assert expected is not None
        assert torch.equal(value[last], expected)
    ones = torch.ones(tokens, device="cuda")
    kernels().differentiate_(logits, rows, 1.0, whole.lse, ones, ones, ones)
    kernels().differentiate_(alone, rows[last], 1.0, part.lse, ones[last], ones[last], ones[last])
    assert torch.equal(logits[last], alone)


def test_one_weight_gradient_does_not_lose_small_chunks() -> None:
    """Like the test in tests/unit/losses/test_logprobs.py: 4000 chunks of +1/2 and -1/2 are added in FP32."""
    hidden = torch.ones(4000, 8, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    logprobs, *_ = token_logprobs(
        hidden, weight, torch.zeros(4000, dtype=torch.int64, device="cuda"), chunk=1
    )
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[2000.0] * 8, [-2000.0] * 8]


def test_nothing_waits_for_the_device() -> None:
    inputs = inputs_on_gpu(tokens=64, hidden=64, dtype=torch.bfloat16)
    run(inputs, None, chunk=32)  # compiles the kernels and allocates memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, None, chunk=32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
