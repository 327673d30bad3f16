"""This rank's Megatron parameters -> whole Hugging Face tensors, gathered over the tensor and the expert axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.weights.mapping import Entry, WeightMap


def hf_tensors(
    parameters: Mapping[str, Tensor],
    weights: WeightMap,
    *,
    tensor_group: dist.ProcessGroup | None,
    expert_group: dist.ProcessGroup | None,
    vocab_size: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor) of this pipeline stage's parameters.

    Only rank 0 of the groups yields; the others take part in the gathers and yield nothing, but must drain the
    iterator. One gather for every Hugging Face tensor that is cut, and one for every part of a local expert. At any
    time one whole tensor, or one expert of every rank, is alive here beside the parameters; where nothing is gathered,
    tensors may be views of these. ``dtype`` converts; by default tensors keep the parameter's.

    Args:
        tensor_group: this rank's tensor-parallel group; None where another replica gives all but the experts away.
        expert_group: this rank's expert-parallel group; None where another replica gives the experts away.
    """
    for name, parameter in parameters.items():
        entry = weights.entry(name)
        group = expert_group if entry.rule.of_expert else tensor_group
        if group is None or not entry.rule.exported:
            continue
        is_root = dist.get_rank(group) == 0
        axis = entry.rule.transform.axis
        for index, part in enumerate(entry.rule.transform.split(parameter.detach())):
            if entry.expert is not None:
                wholes = _gather(part, group)
            else:
                wholes = [part if axis is None else _join(_gather(part, group), axis)]
            if not is_root:
                continue
            for rank, whole in enumerate(wholes):
                hf = _held_by(entry, rank, weights.num_experts // len(wholes)).hf[index]
                rows = vocab_size if entry.rule.vocab else len(whole)
                yield hf, whole[:rows].to(dtype or whole.dtype).contiguous()


def _held_by(entry: Entry, rank: int, experts_per_rank: int) -> Entry:
    """The parameter that expert-parallel ``rank`` holds in this place; rank 0's is ``entry``."""
    if entry.expert is None:
        return entry
    return replace(entry, expert=entry.expert % experts_per_rank + rank * experts_per_rank)


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    size = dist.get_world_size(group)
    if size == 1:
        return [part]
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
