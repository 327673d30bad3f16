"""Model FLOP/s of a step's training, by the planner's convention (``costs/flops.py``)."""

from __future__ import annotations

import torch

from megatron_chord.costs.flops import train_flops
from megatron_chord.costs.gpus import Gpu, gpu_by_driver_name
from megatron_chord.families.shape import ModelShape


def throughput(
    shape: ModelShape,
    *,
    tokens: int,
    squared_tokens: int,
    passes: float,
    seconds: float,
    ranks: int,
    gpu: Gpu | None,
) -> dict[str, float]:
    """``tflops_per_gpu`` and, if the GPU type is known, ``mfu``: the fraction of the BF16 peak.

    Args:
        tokens: number of tokens that pass through the model.
        squared_tokens: sum over sequences of length squared.
        passes: number of passes. A forward and backward pass counts as 1, a forward pass alone as 1/3. Recomputation is
            not counted.
        seconds: the time of all passes.
    """
    mean_length = squared_tokens / tokens if tokens else 0.0
    per_gpu = passes * tokens * train_flops(shape, mean_length) / seconds / ranks
    found = {"tflops_per_gpu": per_gpu / 1e12}
    return found if gpu is None else found | {"mfu": per_gpu / gpu.peak_flops}


def own_gpu() -> Gpu | None:
    """The GPU type of this process; None without CUDA or for an unknown type."""
    return gpu_by_driver_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def held_gpus(ranks: int) -> dict[str, int]:
    """The metric ``gpus``: one GPU for each rank. Empty without CUDA."""
    return {"gpus": ranks} if torch.cuda.is_available() else {}
