"""Estimates the time of the trainer's passes over a step's tokens. See docs/planning.md, "Training"."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.flops import train_flops
from megatron_chord.costs.gpus import GPUS, Gpu
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
    factor = constants.context_factor ** math.log2(parallel.context) / slowdown
    cost = pass_cost(shape, gpu, tensor=parallel.tensor, fp8=fp8, long_packs=long_packs, constants=constants)
    return Speed(efficiency=factor / cost * (1 - bubble), bubble=bubble)


def pass_cost(
    shape: ModelShape,
    gpu: Gpu,
    *,
    tensor: int,
    fp8: bool = False,
    long_packs: bool = False,
    constants: Constants = CONSTANTS,
) -> float:
    """Time of a pass over its time at the BF16 peak, before bubbles.

    Products of matrices grow with the square of the hidden size; element-wise work and communication grow with the
    hidden size. Relative to the products these two fall as 1 / hidden size. The constants are those of an H100; on
    another GPU these two grow with its peak over the bandwidth of its memory, or over that of its link.
    """
    floors = {
        (False, False): constants.bf16_floor,
        (False, True): constants.bf16_long_floor,
        (True, False): constants.fp8_floor,
        (True, True): constants.fp8_long_floor,
    }
    base = GPUS["h100"]
    peak = gpu.peak_flops / base.peak_flops
    linear = constants.width_cost * peak * base.bandwidth / gpu.bandwidth
    linear += constants.tensor_cost * (tensor - 1) * peak * base.link / gpu.link
    cost = floors[fp8, long_packs] + linear / shape.hidden_size
    return cost * (constants.moe_cost if shape.experts else 1.0)


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
