"""Transforms between Hugging Face tensors and one Megatron-Core parameter, on one tensor-parallel rank.

A transform says along which axis each Hugging Face tensor is cut over the tensor-parallel ranks (always in equal
parts), and how the *local* parts are arranged in Megatron's local parameter. Megatron keeps whole heads together and
puts the local gate above the local up projection. So it is exact to cut first and then merge the local parts. No rank
needs the whole parameter, and the same table gives the inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """``axis`` is the axis along which every Hugging Face tensor is cut over tensor-parallel ranks; None if
    replicated."""

    @property
    def axis(self) -> int | None: ...

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """This rank's parts of the Hugging Face tensors -> this rank's Megatron parameter."""
        ...

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The inverse of ``merge``, bit for bit."""
        ...

    def rows(self, start: int, stop: int, of: int) -> list[slice]:
        """The rows of each Hugging Face tensor from which ``merge`` makes rows [start, stop) of the parameter.

        ``of`` is the parameter's number of rows. Both ends must be multiples of ``unit``, or ``of`` itself.
        """
        ...

    @property
    def unit(self) -> int:
        """Number of the parameter's rows that can only be computed together."""
        ...


def merged_shape(transform: Transform, shapes: Sequence[Sequence[int]]) -> tuple[int, ...] | str:
    """The shape of the result of ``merge`` for parts of these shapes, or the reason why it fails. Allocates nothing."""
    try:
        return tuple(transform.merge([torch.empty(tuple(shape), device="meta") for shape in shapes]).shape)
    except (RuntimeError, ValueError) as error:
        return str(error)


@dataclass(frozen=True)
class Same:
    """One tensor that is equal on both sides."""

    axis: int | None = None
    unit: int = field(default=1, init=False)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def split(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]

    def rows(self, start: int, stop: int, of: int) -> list[slice]:
        return [slice(start, stop)]


@dataclass(frozen=True)
class Stacked:
    """Several tensors of one shape, concatenated by rows: the gate and up projections of a gated MLP."""

    count: int = 2
    axis: int | None = 0
    unit: int = field(default=1, init=False)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        assert len(parts) == self.count
        return torch.cat(list(parts))

    def split(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(self.count))

    def rows(self, start: int, stop: int, of: int) -> list[slice]:
        each = of // self.count
        firsts = range(0, of, each)
        return [slice(min(max(start - first, 0), each), min(max(stop - first, 0), each)) for first in firsts]


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value rows interleaved by key-value group: [q.. of the group, k, v] (weights and biases)."""

    queries_per_group: int
    head_dim: int
    axis: int | None = 0

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        query, key, value = parts
        grouped = [
            query.unflatten(0, (-1, self.queries_per_group * self.head_dim)),
            key.unflatten(0, (-1, self.head_dim)),
            value.unflatten(0, (-1, self.head_dim)),
        ]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, parameter: Tensor) -> list[Tensor]:
        grouped = parameter.unflatten(0, (-1, self.unit))
        return [part.flatten(0, 1) for part in grouped.split(self._sizes, dim=1)]

    def rows(self, start: int, stop: int, of: int) -> list[slice]:
        return [slice(start // self.unit * size, stop // self.unit * size) for size in self._sizes]

    @property
    def unit(self) -> int:
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        """Number of rows of a group's queries, key and value."""
        return [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
