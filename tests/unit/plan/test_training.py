"""The predicted times of passes and updates are compared with hand arithmetic."""

from __future__ import annotations

import pytest

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.gpus import GPUS
from megatron_chord.plan.constants import CONSTANTS
from megatron_chord.plan.training import micro_batches, pass_cost, pass_seconds, reduction_seconds, speed
from tests.support.published import shape_of


def test_bubble() -> None:
    shape, gpu = shape_of("llama-3.1-70b"), GPUS["h100"]
    assert speed(shape, ParallelConfig(), gpu, micro_batches=3).bubble == 0
    assert speed(shape, ParallelConfig(pipeline=4), gpu, micro_batches=9).bubble == pytest.approx(3 / 12)
    virtual = ParallelConfig(pipeline=4, virtual_pipeline=5)
    assert speed(shape, virtual, gpu, micro_batches=9).bubble == pytest.approx(3 / 48)


def test_cost_of_a_layout() -> None:
    """A floor, and what falls with the hidden size of 8192: element-wise work, and three peers' communication."""
    shape, gpu, of = shape_of("llama-3.1-70b"), GPUS["h100"], CONSTANTS
    plain = speed(shape, ParallelConfig(), gpu, micro_batches=8).efficiency
    assert plain == pytest.approx(1 / (of.bf16_floor + of.width_cost / 8192))
    parallel = ParallelConfig(tensor=4, sequence_parallel=True, context=4)
    cost = of.bf16_floor + (of.width_cost + 3 * of.tensor_cost) / 8192
    assert speed(shape, parallel, gpu, micro_batches=8).efficiency == pytest.approx(
        of.context_factor**2 / cost
    )
    experts = shape_of("qwen3-30b-a3b")
    # 8 copies of 2048 numbers in each of 48 layers; 3,041,656,832 parameters multiply a token.
    active = 48 * (2048 * (4096 + 2 * 512) + 4096 * 2048 + 2048 * 128 + 8 * 3 * 2048 * 768) + 151936 * 2048
    copies = of.expert_cost * 48 * 8 * 2048 / active
    assert pass_cost(experts, gpu, tensor=1) == pytest.approx(of.bf16_floor + of.width_cost / 2048 + copies)
    slow = pass_cost(experts, gpu, tensor=1, slowdown=1.5)
    assert slow == pytest.approx(1.5 * (of.bf16_floor + of.width_cost / 2048) + copies)


def test_an_update_moves_gradients_and_weights_between_ranks() -> None:
    """8 bytes a parameter. In a node over NVLink; between nodes over the ports of the ranks that share the weights."""
    shape, gpu, port = shape_of("llama-3.1-8b"), GPUS["h100"], CONSTANTS.port
    size = 8 * 8_030_261_248

    def seconds(gpus: int, tensor: int = 1) -> float:
        parallel = ParallelConfig(tensor=tensor, sequence_parallel=tensor > 1)
        return reduction_seconds(shape, parallel, gpu, gpus=gpus, parameter_bytes=8)

    assert seconds(1) == 0
    assert seconds(8) == pytest.approx(size * 7 / 8 / 450e9)
    assert seconds(64) == pytest.approx(size * 63 / 64 / (8 * port))  # below the 450 GB/s of NVLink
    # With TP 8 each node has one rank of a ring, and each GPU an eighth of the weights (norms are whole: rel).
    assert seconds(64, tensor=8) == pytest.approx(size / 8 * 7 / 8 / port, rel=1e-3)


def test_experts_are_reduced_over_ranks_with_the_same_ones() -> None:
    """16 ranks, expert axis 8: two ranks have the same experts, one in each node."""
    shape, gpu = shape_of("qwen3-30b-a3b"), GPUS["h100"]
    found = reduction_seconds(shape, ParallelConfig(expert=8), gpu, gpus=16, parameter_bytes=6)
    experts = 48 * 128 * 3 * 2048 * 768
    others = 30_532_122_624 - experts
    expected = 6 * others * 15 / 16 / (8 * CONSTANTS.port) + 6 * experts / 8 / 2 / CONSTANTS.port
    assert found == pytest.approx(expected)


def test_precision_and_full_packs_have_floors_of_their_own() -> None:
    shape, gpu, of = shape_of("llama-3.1-8b"), GPUS["h100"], CONSTANTS
    kinds = [(fp8, full) for fp8 in (False, True) for full in (False, True)]
    costs = [pass_cost(shape, gpu, tensor=1, fp8=fp8, long_packs=full) for fp8, full in kinds]
    floors = [of.bf16_floor, of.bf16_long_floor, of.fp8_floor, of.fp8_long_floor]
    assert costs == pytest.approx([floor + of.width_cost / 4096 for floor in floors])
    assert costs[0] > costs[1] > costs[3]
    assert costs[0] > costs[2] > costs[3]


def test_slow_links_and_memory_cost_more() -> None:
    shape, of = shape_of("llama-3.1-8b"), CONSTANTS
    slow = GPUS["l40s"]
    peak = slow.peak_flops / 989e12
    width = of.width_cost * peak * 3.35e12 / 0.864e12
    tensor = of.tensor_cost * 7 * peak * 900e9 / 64e9
    assert pass_cost(shape, slow, tensor=8) == pytest.approx(of.bf16_floor + (width + tensor) / 4096)


def test_blackwell_reaches_less_of_its_peak() -> None:
    """[MLENG]: Llama-3.1-8B in BF16 at 8192 tokens, the same software on an H200 (461 TFLOP/s) and on a B200 (778)."""
    shape, h200, b200 = shape_of("llama-3.1-8b"), GPUS["h200"], GPUS["b200"]
    rates = [gpu.peak_flops / pass_cost(shape, gpu, tensor=1, long_packs=True) for gpu in (h200, b200)]
    assert rates[1] / rates[0] == pytest.approx(778 / 461, rel=0.01)


def test_seconds_of_a_pass() -> None:
    shape, gpu = shape_of("qwen2.5-7b"), GPUS["h100"]
    found = pass_seconds(shape, gpu, gpus=8, tokens=1e6, length=2048, efficiency=0.42)
    assert found == pytest.approx(1e6 * 43.7e9 / (8 * 989e12 * 0.42), rel=2e-3)


def test_number_of_micro_batches() -> None:
    assert micro_batches(100_000, data=4, budget=8192) == 4  # 25000 tokens a rank
    assert micro_batches(100_000, data=4, budget=8192, multiple=3) == 6
    assert micro_batches(10, data=4, budget=8192) == 1
