"""How long the trainer's passes over a step's tokens take. docs/planning.md, "Training"."""

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
    """Model FLOP/s over the peak of all GPUs, without recomputation."""
    bubble: float
    """Share of the time that a pipeline stage waits."""


def micro_batches(tokens: float, *, data: int, budget: int, multiple: int = 1) -> int:
    """Of one data-parallel rank in an update of ``tokens``; a multiple of ``multiple``."""
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
    """``slowdown``: of the fullest pipeline stage, against equal ones (``costs.balance``); all wait for it."""
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
    """The value in the table. Between entries it is that of the next larger one; beyond, the last ratio per
    doubling."""
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
    """Of ``passes`` times the forward and backward pass over ``tokens`` tokens; a forward pass alone is a third."""
    return passes * tokens * train_flops(shape, length) / (gpus * gpu.peak_flops * efficiency)
