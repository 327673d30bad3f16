"""Estimates the time of the trainer's passes over a step's tokens. See docs/planning.md, "Training"."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.flops import train_flops
from megatron_chord.costs.gpus import Gpu
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
    *,
    micro_batches: int,
    slowdown: float = 1.0,
    fp8: bool = False,
    constants: Constants = CONSTANTS,
) -> Speed:
    """The efficiency of a layout. ``slowdown`` is that of the largest pipeline stage, for which all stages wait
    (``costs.balance``)."""
    chunks = parallel.virtual_pipeline or 1
    waits, works = parallel.pipeline - 1, micro_batches * chunks
    bubble = waits / (works + waits)
    factor = constants.context_factor ** math.log2(parallel.context)
    factor *= constants.pipeline_factor ** math.log2(parallel.pipeline)
    factor *= tensor_factor(parallel.tensor, constants)
    factor *= constants.moe_factor if shape.experts else 1.0
    factor *= constants.fp8_factor if fp8 else 1.0
    factor /= slowdown
    return Speed(efficiency=constants.train_efficiency * factor * (1 - bubble), bubble=bubble)


def tensor_factor(tensor: int, constants: Constants = CONSTANTS) -> float:
    """The factor in the table. Between two entries it is that of the larger one. Beyond the table the last ratio
    applies to each doubling."""
    known = dict(constants.tensor_factor)
    for size in sorted(known):
        if tensor <= size:
            return known[size]
    last, before = sorted(known)[-1], sorted(known)[-2]
    return known[last] * (known[last] / known[before]) ** math.log2(tensor / last)


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
