"""Describes the distributed optimizer's state, to save it without gathering it and to load it in place.

Every rank of a data-parallel group keeps a share of the optimizer's state: of each parameter a range of its flattened
elements. Megatron-Core 0.16.1 gathers all shares on every rank before a save, 12 bytes a parameter in host memory
(``distrib_optimizer.py``, ``get_parameter_state_dp_zero``). Here its own code describes the gathered buffers, but the
buffers are on the meta device and have no memory. A tensor of the description is a view into such a buffer. So its
place in the buffer says which of its elements this rank keeps, and this rank writes only these. For loading,
Megatron-Core allocates whole buffers on every rank. With the same description a rank reads only what it keeps, straight
into the optimizer's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_chord.train.state import parts_of

_KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Kept:
    """The elements ``start`` to ``end`` (exclusive) of a gathered buffer; this rank keeps them in ``data()``, a flat
    tensor."""

    start: int
    end: int
    data: Callable[[], Tensor]


@dataclass(frozen=True)
class KeptBox:
    """A rectangular part of a tensor: its offset and shape there. ``data()`` is this rank's memory with its elements, a
    view of what the optimizer uses."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    data: Callable[[], Tensor]


@dataclass(frozen=True)
class Shares:
    """What this rank keeps of each gathered buffer."""

    _buffers: dict[int, tuple[Tensor, list[Kept]]] = field(
        default_factory=dict[int, tuple[Tensor, list[Kept]]]
    )
    """Each gathered buffer and what this rank keeps of it, by the address of the buffer's storage. The tensor keeps the
    storage alive, so that no other storage gets the address."""

    def add(self, buffer: Tensor, kept: list[Kept]) -> None:
        self._buffers[_storage(buffer)] = buffer, kept

    def boxes(self, view: Tensor) -> Iterator[KeptBox]:
        """The boxes of a view of a gathered buffer that this rank keeps. Axes with decreasing strides, as in a slice
        of a contiguous tensor.

        Raises:
            RuntimeError: ``view`` is not a view of a gathered buffer.
        """
        if _storage(view) not in self._buffers:
            raise RuntimeError(f"a tensor {tuple(view.shape)} of the optimizer's state is a copy, not a view")
        first = int(view.storage_offset())
        for kept in self._buffers[_storage(view)][1]:
            for offset, shape in within(
                tuple(view.shape), view.stride(), kept.start - first, kept.end - first
            ):
                start = (
                    first
                    + sum(at * step for at, step in zip(offset, view.stride(), strict=True))
                    - kept.start
                )
                yield KeptBox(offset, shape, functools.partial(_cut, kept.data, shape, view.stride(), start))


@contextmanager
def described_only(optimizer: Any) -> Iterator[Shares]:
    """Within the context, ``optimizer.sharded_state_dict`` describes state of distributed optimizers on the meta
    device, and ``load_state_dict`` leaves it as it is. The yielded object then has this rank's shares. No collectives.
    """
    shares = Shares()
    changed = [one for one in parts_of(optimizer) if hasattr(one, "get_parameter_state_dp_zero")]
    for one in changed:
        one.get_parameter_state_dp_zero = functools.partial(_described, one, shares)
        one.load_parameter_state_from_fully_reshardable = lambda state: None
    try:
        yield shares
    finally:
        for one in changed:
            del one.get_parameter_state_dp_zero
            del one.load_parameter_state_from_fully_reshardable


def within(
    shape: tuple[int, ...], strides: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide the elements of a strided tensor whose positions are in [low, high) into boxes (offset, shape).

    The position of an element is the sum of index x stride. Each stride is larger than what the axes after it span.
    """
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape or low > span or high <= 0 or low >= high:
        return
    if low <= 0 and span < high:
        yield (0,) * len(shape), shape
        return
    size, stride = shape[0], strides[0]
    inner = span - (size - 1) * stride
    first = max(0, -(-low // stride))  # first row that begins at low or after it
    last = min(
        size, (high - 1 - inner) // stride + 1
    )  # exclusive: the first row that does not end before high
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for row in {first - 1, max(first, last)} if first <= last else {first - 1}:
        if 0 <= row < size:
            for offset, inner_shape in within(
                shape[1:], strides[1:], low - row * stride, high - row * stride
            ):
                yield (row, *offset), (1, *inner_shape)


def _described(one: Any, shares: Shares, *_: Any, **__: Any) -> dict[Any, Any]:
    """The result of ``get_parameter_state_dp_zero``, on the meta device."""
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(one.gbuf_ranges):
        buffer, state[index] = one.buffers[index], {}
        for dtype, buckets in ranges.items():
            world: dict[str, Any] = {"numel_unpadded": buffer.numel_unpadded}
            for key in _KEYS:
                world[key] = torch.empty(buffer.numel, dtype=torch.float32, device="meta")
                kept: list[Kept] = []
                for bucket in buckets:
                    for param, place in bucket["param_map"].items():
                        start = buffer.param_index_map[param][0]
                        here = place["param"]
                        data = functools.partial(_state, one, param, key)
                        kept.append(Kept(start + here.start, start + here.end, data))
                shares.add(world[key], kept)
            state[index][dtype] = world
    return state


def _state(one: Any, param: Tensor, key: str) -> Tensor:
    return one._get_main_param_and_optimizer_states(param)[key].detach()


def _cut(data: Callable[[], Tensor], shape: tuple[int, ...], strides: tuple[int, ...], start: int) -> Tensor:
    flat = data().view(-1)
    return flat.as_strided(shape, strides, flat.storage_offset() + start)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
