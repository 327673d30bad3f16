"""Export: this rank's Megatron parameters -> full Hugging Face tensors, gathered over the tensor and expert axes."""

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
    """Yield (Hugging Face name, full tensor) of this pipeline stage's parameters.

    Only rank 0 of the groups yields. The other ranks take part in the gathers and yield nothing, but must iterate to
    the end. Collectives: one gather for every Hugging Face tensor that is cut, and one for every part of a local
    expert. Additional memory: one full tensor, or one expert of every rank. Tensors that are not gathered may be views
    of the parameters. ``dtype`` converts the tensors; by default they keep the parameter's dtype.

    Args:
        tensor_group: this rank's tensor-parallel group; None if another replica exports the parameters except experts.
        expert_group: this rank's expert-parallel group; None if another replica exports the experts.
    """
    for name, parameter in parameters.items():
        entry = weights.entry(name)
        group = expert_group if entry.rule.of_expert else tensor_group
        if group is None or not entry.rule.exported:
            continue
        is_root = dist.get_rank(group) == 0
        axis = entry.rule.transform.axis
        for index, part in enumerate(entry.rule.transform.split(parameter.detach())):
            is_cut = entry.expert is not None or axis is not None
            parts = _gather(part, group) if is_cut else [part]
            if not is_root:
                if is_cut and part.is_cuda:
                    # No kernel of this rank may queue behind a gather that waits for another rank: this process may at
                    # the same time receive weights for the servers of its node (rollout/relay.py).
                    torch.cuda.current_stream(part.device).synchronize()
                continue
            wholes = parts if entry.expert is not None or axis is None else [_join(parts, axis)]
            for rank, whole in enumerate(wholes):
                hf = _held_by(entry, rank, weights.num_experts // len(wholes)).hf[index]
                rows = vocab_size if entry.rule.vocab else len(whole)
                yield hf, whole[:rows].to(dtype or whole.dtype).contiguous()


def _held_by(entry: Entry, rank: int, experts_per_rank: int) -> Entry:
    """The parameter that expert-parallel ``rank`` has in the position in which rank 0 has ``entry``."""
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
