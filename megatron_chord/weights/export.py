"""Export: this rank's Megatron parameters -> full Hugging Face tensors, gathered over the tensor and expert axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.weights.mapping import Entry, WeightMap
from megatron_chord.weights.sums import part_sum


@dataclass(frozen=True)
class _Part:
    """This rank's part of one Hugging Face tensor, or of one for each expert-parallel rank."""

    entry: Entry
    index: int
    """Position of the tensor among those of the parameter."""
    tensor: Tensor
    group: dist.ProcessGroup
    """The group whose first rank exports the tensor."""
    axis: int | None
    """The axis along which the tensor is cut over the group; None if each rank has a whole tensor."""

    @property
    def is_gathered(self) -> bool:
        return self.entry.expert is not None or self.axis is not None

    def name(self, rank: int, num_experts: int) -> str:
        """The Hugging Face name of the tensor that ``rank`` of the group has in this position."""
        entry = self.entry
        if entry.expert is not None:
            per_rank = num_experts // dist.get_world_size(self.group)
            entry = replace(entry, expert=entry.expert % per_rank + rank * per_rank)
        return entry.hf[self.index]


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
    for part in _parts(parameters, weights, tensor_group, expert_group):
        gathered = _gather(part.tensor, part.group) if part.is_gathered else [part.tensor]
        if dist.get_rank(part.group) != 0:
            if part.is_gathered and part.tensor.is_cuda:
                # No kernel of this rank may queue behind a gather that waits for another rank, because this process
                # may receive weights for the servers of its node at the same time (rollout/relay.py).
                torch.cuda.current_stream(part.tensor.device).synchronize()
            continue
        wholes = gathered if part.axis is None else [_join(gathered, part.axis)]
        for rank, whole in enumerate(wholes):
            rows = vocab_size if part.entry.rule.vocab else len(whole)
            yield part.name(rank, weights.num_experts), whole[:rows].to(dtype or whole.dtype).contiguous()


def expected_sums(
    parameters: Mapping[str, Tensor],
    weights: WeightMap,
    *,
    tensor_group: dist.ProcessGroup | None,
    expert_group: dist.ProcessGroup | None,
    vocab_size: int,
) -> dict[str, int]:
    """The sum (``sums.part_sum``) of each tensor that ``hf_tensors`` yields on this rank, without a gather of tensors.

    The arguments are those of ``hf_tensors``. Collectives: a gather over each group of one int64 for each part.
    """
    mine: dict[dist.ProcessGroup, list[tuple[_Part, Tensor]]] = {}
    for part in _parts(parameters, weights, tensor_group, expert_group):
        tensor, rank = part.tensor, dist.get_rank(part.group)
        start = {axis: rank * tensor.shape[axis] for axis in (0, 1) if axis == part.axis}
        if part.entry.rule.vocab:
            tensor = tensor[: max(0, vocab_size - start.get(0, 0))]
        if part.is_gathered or rank == 0:
            total = part_sum(tensor, row=start.get(0, 0), column=start.get(1, 0))
        else:  # rank 0 has the whole tensor, too
            total = tensor.new_zeros((), dtype=torch.int64)
        mine.setdefault(part.group, []).append((part, total))
    found = {}
    for group, parts in mine.items():
        sums = torch.stack(_gather(torch.stack([total for _, total in parts]), group)).cpu()
        if dist.get_rank(group) != 0:
            continue
        for (part, _), each in zip(parts, sums.unbind(1), strict=True):
            wholes = each.sum(0, keepdim=True) if part.entry.expert is None else each
            for rank, total in enumerate(wholes.tolist()):
                found[part.name(rank, weights.num_experts)] = total
    return found


def _parts(
    parameters: Mapping[str, Tensor],
    weights: WeightMap,
    tensor_group: dist.ProcessGroup | None,
    expert_group: dist.ProcessGroup | None,
) -> Iterator[_Part]:
    """This rank's parts in the order of the export, which is the same on all ranks of a group."""
    for name, parameter in parameters.items():
        entry = weights.entry(name)
        group = expert_group if entry.rule.of_expert else tensor_group
        if group is None or not entry.rule.exported:
            continue
        transform = entry.rule.transform
        axis = None if entry.expert is not None else transform.axis
        for index, tensor in enumerate(transform.split(parameter.detach())):
            yield _Part(entry, index, tensor, group, axis)


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's part: views of one buffer.

    Not ``all_gather`` with a list: NCCL's process group then gathers into a buffer of its own and copies it into the
    list, on the same stream (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, allgather). These copies would queue
    behind the gather, and with CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron's overlapping needs, kernels of all
    streams queue behind them (see ``hf_tensors``).
    """
    size = dist.get_world_size(group)
    if size == 1:
        return [part]
    whole = part.new_empty((size, *part.shape))
    dist.all_gather_into_tensor(whole.view(-1), part.contiguous().view(-1), group=group)
    return list(whole.unbind())
