"""Offloads training state to host memory while servers sample on the same GPUs, and brings it back.

Optimizer state (FP32 weights and Adam's moments), gradients and a reference policy are offloaded. The weights stay on
the GPU, because they are pushed to the servers. Tensor objects do not change, and views of a buffer stay views of it:
only the storage below them is emptied and filled again.

For gradients we use Megatron-Core's ``offload_grad_buffers``; gradients are not saved, because each update begins by
setting them to zero. We do not use the ``offload_to_cpu`` of Megatron's optimizers. It copies through pageable memory.
And in FP32, where the optimizer's parameters are views of the model's, it moves the weights and returns copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_chord.model.forward import unwrapped
from megatron_chord.train.state import TrainState

_PIECE = 2**28
"""Bytes of a block of host memory. CUDA's pinned allocator rounds sizes up to powers of two, so one block for each
storage, or a single block for all, could use twice the necessary memory."""


class Offload:
    """Offloads the state of one rank. Host memory is allocated once and kept.

    CUDA graphs and buffers registered with NCCL would keep the old addresses; the trainer uses neither. NCCL's own
    buffers stay on the GPU, and so does the gradient that a learned mu stores.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._host: list[Tensor] = []
        self._moved: list[tuple[torch.UntypedStorage, int]] | None = None

    @property
    def is_on_host(self) -> bool:
        return self._moved is not None

    def to_host(self) -> None:
        """Offload the state, if not done yet. The GPU memory is free for other processes when this returns."""
        if self._moved is not None:
            return
        moved = [(storage, storage.nbytes()) for storage in storages(self._state)]
        self._reserve(sum(size for _, size in moved))
        for here, there in self._pieces(moved):
            there.copy_(here, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for storage, _ in moved:
            storage.resize_(0)
        for chunk in self._state.chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._moved = moved

    def to_device(self) -> None:
        """Bring the state back to the GPU, if it is offloaded. Gradients are zero afterwards."""
        if self._moved is None:
            return
        for storage, size in self._moved:
            storage.resize_(size)
        for here, there in self._pieces(self._moved):
            here.copy_(there, non_blocking=True)
        for chunk in self._state.chunks:
            chunk.restore_grad_buffers(synchronize=False)
        self._moved = None

    def _reserve(self, size: int) -> None:
        while len(self._host) * _PIECE < size:
            self._host.append(torch.empty(_PIECE, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))

    def _pieces(self, moved: list[tuple[torch.UntypedStorage, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of equally long parts, as bytes: of a storage, and of a host block. Host blocks have the concatenated
        storages."""
        place = 0
        for storage, size in moved:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            start = 0
            while start < size:
                offset = place % _PIECE
                length = min(size - start, _PIECE - offset)
                yield flat[start : start + length], self._host[place // _PIECE][offset : offset + length]
                start, place = start + length, place + length


def storages(state: TrainState) -> list[torch.UntypedStorage]:
    """The storages of optimizer state and reference weights, except those that the trained model's weights share."""
    kept = {
        tensor.untyped_storage().data_ptr() for chunk in state.chunks for tensor in _tensors(unwrapped(chunk))
    }
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in (*_optimizer_tensors(state), *(t for chunk in state.reference for t in _tensors(chunk))):
        storage = tensor.untyped_storage()
        if tensor.device == state.groups.device and storage.nbytes() and storage.data_ptr() not in kept:
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _optimizer_tensors(state: TrainState) -> Iterator[Tensor]:
    for part in state.optimizer.chained_optimizers:
        if part.optimizer is None:  # this rank has none of its parameters
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for values in part.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
