"""Estimates the time of the trainer's passes over a step's tokens. See docs/planning.md, "Training"."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.flops import train_flops
from megatron_chord.costs.gpus import GPUS, Gpu
from megatron_chord.costs.parameters import Sizes, active_count, rank_count
from megatron_chord.families.shape import ModelShape
from megatron_chord.plan.constants import CONSTANTS, Constants


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Efficiency of the trainer's GPUs under a layout."""

    efficiency: float
    """Model FLOP/s divided by the peak of all GPUs, without recomputation."""
    bubble: float
    """Share of the time that a pipeline stage waits."""


def micro_batches(tokens: float, *, data: int, budget: int, multiple: int = 1) -> int:
    """Number of micro-batches of one data-parallel rank in an update of ``tokens`` tokens; a multiple of
    ``multiple``."""
    return math.ceil(max(1, math.ceil(tokens / (data * budget))) / multiple) * multiple


def speed(
    shape: ModelShape,
    parallel: ParallelConfig,
    gpu: Gpu,
    *,
    micro_batches: int,
    slowdown: float = 1.0,
    fp8: bool = False,
    long_packs: bool = False,
    constants: Constants = CONSTANTS,
) -> Speed:
    """The efficiency of a layout.

    Args:
        slowdown: that of the largest pipeline stage, for which all stages wait (``costs.balance``).
        long_packs: training without rollouts, whose packs are always full.
    """
    chunks = parallel.virtual_pipeline or 1
    waits, works = parallel.pipeline - 1, micro_batches * chunks
    bubble = waits / (works + waits)
    factor = constants.context_factor ** math.log2(parallel.context)
    cost = pass_cost(
        shape,
        gpu,
        tensor=parallel.tensor,
        slowdown=slowdown,
        fp8=fp8,
        long_packs=long_packs,
        constants=constants,
    )
    return Speed(efficiency=factor / cost * (1 - bubble), bubble=bubble)


def pass_cost(
    shape: ModelShape,
    gpu: Gpu,
    *,
    tensor: int,
    slowdown: float = 1.0,
    fp8: bool = False,
    long_packs: bool = False,
    constants: Constants = CONSTANTS,
) -> float:
    """Time of a pass relative to its time at the BF16 peak, without pipeline bubbles.

    Products of matrices grow with the square of the hidden size; element-wise work and communication grow with the
    hidden size. Relative to the products these two fall as 1 / hidden size. Where a model has experts, each layer also
    sends ``top_k`` copies of a token's hidden state to experts and back. The constants are those of an H100; on another
    GPU element-wise work and these copies grow with its peak over the bandwidth of its memory, tensor parallelism's
    communication with its peak over the bandwidth of its link, and products by ``Gpu.product_cost``.

    ``slowdown`` counts FLOPs. It multiplies all but the copies, which the head of the last stage does not have.
    """
    floors = {
        (False, False): constants.bf16_floor,
        (False, True): constants.bf16_long_floor,
        (True, False): constants.fp8_floor,
        (True, True): constants.fp8_long_floor,
    }
    base = GPUS["h100"]
    peak = gpu.peak_flops / base.peak_flops
    memory_bound = peak * base.bandwidth / gpu.bandwidth
    linear = constants.width_cost * memory_bound
    linear += constants.tensor_cost * (tensor - 1) * peak * base.link / gpu.link
    copies = constants.expert_cost * memory_bound * expert_copies(shape) / active_count(shape)
    products = gpu.product_cost * floors[fp8, long_packs]
    return slowdown * (products + linear / shape.hidden_size) + copies


def expert_copies(shape: ModelShape) -> int:
    """Numbers of hidden states that a token sends to experts in all layers: top_k copies in each layer with experts."""
    if shape.experts is None:
        return 0
    layers = shape.num_layers - len(shape.experts.dense_layers)
    return layers * Sizes.of(shape).top_k * shape.hidden_size


def reduction_seconds(
    shape: ModelShape,
    parallel: ParallelConfig,
    gpu: Gpu,
    *,
    gpus: int,
    parameter_bytes: float,
    gpus_per_node: int = 8,
    constants: Constants = CONSTANTS,
) -> float:
    """Seconds in which an optimizer update's gradients are summed over data-parallel ranks, and its weights gathered.

    All of it counts: with ``overlap_grad_reduce`` at most the last micro-batch's backward pass hides a part. A ring
    over n ranks moves (n - 1) / n of the bytes through each rank, over NVLink inside a node. Between nodes it moves
    them through the ports of the node's GPUs that belong to the ring (Megatron-Core 0.16.1's order of ranks: tensor,
    context, data, pipeline; experts: expert, data, pipeline).

    Args:
        gpus: all GPUs that train.
        parameter_bytes: bytes of a gradient and of a weight.
    """
    of_stage = gpus // parallel.pipeline
    last = rank_count(shape, parallel, parallel.pipeline - 1)
    first = rank_count(shape, parallel, 0)
    fullest = max(first, last, key=lambda count: count.total)

    def ring(parameters: int, apart: int) -> float:
        """Ranks with the same ``parameters`` are ``apart`` ranks from each other."""
        ranks = of_stage // apart
        inside = max(1, min(ranks, gpus_per_node // apart))
        rate = gpu.link / 2 if inside == ranks else min(gpu.link / 2, inside * constants.port)
        return parameter_bytes * parameters * (ranks - 1) / ranks / rate

    return ring(fullest.dense, parallel.tensor) + ring(fullest.experts, parallel.expert)


def pass_seconds(
    shape: ModelShape,
    gpu: Gpu,
    *,
    gpus: int,
    tokens: float,
    length: float,
    efficiency: float,
    passes: float = 1.0,
) -> float:
    """Seconds of ``passes`` forward and backward passes over ``tokens`` tokens. A forward pass alone counts 1/3."""
    return passes * tokens * train_flops(shape, length) / (gpus * gpu.peak_flops * efficiency)
