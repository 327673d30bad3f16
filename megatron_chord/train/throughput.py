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
    """``tflops_per_gpu`` and, where the kind of GPU is known, ``mfu``: its share of the peak of BF16 products.

    Args:
        tokens: all that pass through the model.
        squared_tokens: sum of the squares of their sequences' lengths.
        passes: how often they do, a forward and backward pass being 1, a forward pass alone 1/3. Recomputation is
            not counted.
        seconds: that all of it took.
    """
    mean_length = squared_tokens / tokens if tokens else 0.0
    per_gpu = passes * tokens * train_flops(shape, mean_length) / seconds / ranks
    found = {"tflops_per_gpu": per_gpu / 1e12}
    return found if gpu is None else found | {"mfu": per_gpu / gpu.peak_flops}


def own_gpu() -> Gpu | None:
    """This process's kind of GPU; None without CUDA, or where the kind is not known."""
    return gpu_by_driver_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def held_gpus(ranks: int) -> dict[str, int]:
    """``gpus``: one a rank. Nothing without CUDA."""
    return {"gpus": ranks} if torch.cuda.is_available() else {}
