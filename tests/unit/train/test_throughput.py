"""Model FLOP/s are compared with hand arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_chord.costs.gpus import GPUS
from megatron_chord.train.throughput import own_gpu, throughput
from tests.support.published import shape_of

LENGTHS = (1000, 3000, 8000)


def of_lengths(**changes: Any) -> dict[str, float]:
    settings = {
        "tokens": sum(LENGTHS),
        "squared_tokens": sum(length**2 for length in LENGTHS),
        "passes": 1.0,
        "seconds": 0.5,
        "ranks": 4,
        "gpu": None,
    }
    return throughput(shape_of("qwen2.5-7b"), **settings | changes)


def test_sequence_by_sequence() -> None:
    """Qwen2.5-7B has 6 FLOPs for each weight and token, and the attention of each sequence.

    Attention counts n^2 / 2 positions, 28 layers, and 3584 channels with 2 FLOPs in scores and 2 in values, three times
    for forward and backward.
    """
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 152064 * 3584
    flops = sum(6 * weights * n + 3 * 28 * 3584 * (2 + 2) * n**2 / 2 for n in LENGTHS)
    assert of_lengths() == {"tflops_per_gpu": pytest.approx(flops / 0.5 / 4 / 1e12)}


def test_two_epochs_and_a_reference() -> None:
    once, more = of_lengths(), of_lengths(passes=2 + 1 / 3)
    assert more["tflops_per_gpu"] / once["tflops_per_gpu"] == pytest.approx(7 / 3)


def test_mfu_is_the_published_runs() -> None:
    """Llama3-8B at 8192 reaches 14451 tokens/s on each H100. It is published as 744 TFLOP/s [MB-ARCH] of 989."""
    found = throughput(
        shape_of("llama-3.1-8b"),
        tokens=16 * 8192,
        squared_tokens=16 * 8192**2,
        passes=1.0,
        seconds=16 * 8192 / 14451 / 8,
        ranks=8,
        gpu=GPUS["h100"],
    )
    assert found["tflops_per_gpu"] == pytest.approx(744, rel=1e-3)
    assert found["mfu"] == pytest.approx(744 / 989, rel=1e-3)


def test_a_step_without_tokens() -> None:
    assert of_lengths(tokens=0, squared_tokens=0) == {"tflops_per_gpu": 0.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without CUDA")
def test_no_gpu_here() -> None:
    assert own_gpu() is None
