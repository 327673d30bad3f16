"""This rank's Megatron parameters -> whole Hugging Face tensors, one at a time, gathered over the tensor axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.weights.mapping import WeightMap


def hf_tensors(
    parameters: Mapping[str, Tensor],
    weights: WeightMap,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) of this pipeline stage's parameters.

    Only rank 0 of the tensor-parallel ``group`` yields; the others take part in the gathers and yield nothing, but
    must drain the iterator. One gather for every Hugging Face tensor that is cut. At any time one whole tensor is
    alive here beside the parameters. ``dtype`` converts; by default tensors keep the parameter's.
    """
    is_root = dist.get_rank(group) == 0
    for name, parameter in parameters.items():
        entry = weights.entry(name)
        if not entry.rule.exported:
            continue
        axis = entry.rule.transform.axis
        for hf, part in zip(entry.hf, entry.rule.transform.split(parameter.detach()), strict=True):
            whole = part if axis is None else _gather(part, axis, group)
            if not is_root:
                continue
            if entry.rule.vocab:
                whole = whole[:vocab_size]
            yield hf, whole.to(dtype or whole.dtype).contiguous()


def _gather(part: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    if size == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=axis)
