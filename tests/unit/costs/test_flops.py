"""FLOPs are compared with hand arithmetic and with published numbers."""

from __future__ import annotations

import pytest

from megatron_chord.costs.flops import attention_cost, decode_attention_flops, recomputed_flops, train_flops
from tests.support.published import shape_of

# GFLOP of one token's training in sequences of 2048, 8192 and 16384: 6 x (parameters without the input embedding) + 6 x
# layers x query width x length.
FLOPS = [
    ("qwen2.5-7b", (43.7, 47.4, 52.3)),
    ("llama-3.1-8b", (46.6, 51.5, 57.9)),
    ("qwen2.5-32b", (195.9, 208.0, 224.1)),
    ("qwen3-32b", (198.3, 217.7, 243.4)),
    ("llama-3.1-70b", (425.0, 449.2, 481.4)),
    ("qwen2.5-72b", (436.8, 461.0, 493.2)),
]


@pytest.mark.parametrize(("name", "expected"), FLOPS)
def test_flops_of_a_token(name: str, expected: tuple[float, ...]) -> None:
    found = [train_flops(shape_of(name), length) / 1e9 for length in (2048, 8192, 16384)]
    assert found == pytest.approx(expected, abs=0.07)


def test_flops_are_the_published_convention() -> None:
    """NVIDIA publishes tokens and TFLOP per second and GPU for the same run, Llama3-8B and 70B at 8192 [MB-ARCH]."""
    assert 14451 * train_flops(shape_of("llama-3.1-8b"), 8192) / 1e12 == pytest.approx(744, rel=1e-3)
    assert 1602 * train_flops(shape_of("llama-3.1-70b"), 8192) / 1e12 == pytest.approx(719, rel=2e-3)


def test_attention_cost_of_qwen2_5_7b() -> None:
    """The cost is 1.4e-5. A sequence of 70 thousand tokens then spends as much on attention as on products with
    weights."""
    # Each of 28 layers has query and output of 3584 x 3584, key and value of 3584 x 512, and three of 3584 x 18944.
    # Then the head.
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 152064 * 3584
    # Causal forward pass: half of n^2 positions, 2 FLOPs for each channel in scores and in values.
    of_pair = 28 * 2 * (3584 + 3584) / 2
    cost = attention_cost(shape_of("qwen2.5-7b"))
    assert cost == pytest.approx(of_pair / (2 * weights))
    assert cost == pytest.approx(1.42e-5, rel=1e-3)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_attention_cost_is_the_part_that_grows(name: str) -> None:
    shape = shape_of(name)
    without = train_flops(shape, 0)
    assert train_flops(shape, 3000) / without == pytest.approx(1 + attention_cost(shape) * 3000)


def test_latent_attention() -> None:
    """DeepSeek-V3: 128 heads of 128 + 64 for scores and 128 for values, 61 layers."""
    shape = shape_of("deepseek-v3")
    of_position = 3 * 61 * 128 * (192 + 128)
    assert train_flops(shape, 4096) == pytest.approx(6 * 36_624_596_992 + 4096 * of_position)
    # In decoding, a head's scores use the 512 + 64 cached numbers, and its values use the 512.
    assert decode_attention_flops(shape) == 2 * 61 * 128 * (576 + 512)


def test_grouped_attention_decodes_with_all_queries() -> None:
    assert decode_attention_flops(shape_of("qwen2.5-7b")) == 2 * 28 * 2 * 3584


def test_recomputation() -> None:
    """Qwen2.5-7B recomputes three products of 3584 x 18944 in each of 28 layers.

    DeepSeek-V3 recomputes 3 dense MLPs of width 18432. In 58 layers it recomputes 8 experts and a shared one of width
    2048, and the router's 256 rows.
    """
    qwen, deepseek = shape_of("qwen2.5-7b"), shape_of("deepseek-v3")
    assert recomputed_flops(qwen, 2000, "none") == 0
    assert recomputed_flops(qwen, 2000, "full") == pytest.approx(train_flops(qwen, 2000) / 3)
    assert recomputed_flops(qwen, 2000, "mlp") == pytest.approx(2 * 28 * 3 * 3584 * 18944)
    mlps = 3 * 3 * 18432 + 58 * (9 * 3 * 2048 + 256)
    assert recomputed_flops(deepseek, 2000, "mlp") == pytest.approx(2 * mlps * 7168)
