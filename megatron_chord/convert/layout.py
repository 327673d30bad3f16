"""Where a model's parameters lie in Megatron-Core's distributed checkpoint, without allocating the model.

The chunks are built on the meta device for one rank, and Megatron's own ``sharded_state_dict`` says under which keys
and offsets it would save them. The format reshards, so what one rank would save any layout can load.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.convert.stream import Box
from megatron_chord.families.shape import ModelShape
from megatron_chord.model.build import build_chunks, transformer_config
from megatron_chord.runtime import parallel as runtime
from megatron_chord.weights.mapping import Entry

_METADATA = {"singleton_local_shards": False}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One parameter: what it is made of, and its boxes in the checkpoint."""

    entry: Entry
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    """One, or, for a gated MLP's stacked projections, one each: the parameter is these below each other."""

    def piece(self, parameter: Tensor, number: int) -> Tensor:
        """Box ``number``'s part of the whole parameter."""
        return parameter.chunk(len(self.boxes))[number]


@dataclass(frozen=True, kw_only=True)
class Layout:
    parameters: tuple[Stored, ...]
    objects: tuple[tuple[str, bytes], ...]
    """What Megatron saves beside tensors, by key, and asks for when it loads."""


def layout_of(shape: ModelShape, dtype: str) -> Layout:
    """The checkpoint's layout for a model of this shape; starts a process group of one if there is none."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    alone = ParallelConfig()
    runtime.start(alone, seed=0)
    config = transformer_config(shape, ModelConfig(path=Path("."), dtype=dtype), alone)  # type: ignore[arg-type]
    with torch.device("meta"):
        (chunk,) = build_chunks(config, shape)
    parameters: list[Stored] = []
    objects: list[tuple[str, bytes]] = []
    for name, value in chunk.sharded_state_dict(metadata=dict(_METADATA)).items():
        if isinstance(value, ShardedObject):
            objects.append((value.unique_key, _serialized([value.data])))
            continue
        pieces: Any = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        assert all(isinstance(piece, ShardedTensor) for piece in pieces)
        parameters.append(
            Stored(
                entry=shape.weights.entry(name),
                shape=tuple(value.data.shape),
                boxes=tuple(map(_box, pieces)),
            )
        )
    return Layout(parameters=tuple(parameters), objects=tuple(objects))


def without_padding(stored: Stored, vocab_size: int) -> Stored:
    """The parameter without the vocabulary's padding rows, which depend on the layout that wrote it."""
    if not stored.entry.rule.vocab:
        return stored
    shape = (vocab_size, *stored.shape[1:])
    return replace(stored, shape=shape, boxes=tuple(replace(box, shape=shape) for box in stored.boxes))


def merged(pieces: Sequence[Tensor], stored: Stored) -> Tensor:
    """The parameter from its boxes' contents."""
    whole = torch.cat([piece.flatten(0, piece.dim() - len(stored.shape)) for piece in pieces])
    return whole.reshape(stored.shape)


def _box(piece: Any) -> Box:
    return Box(
        key=piece.key,
        offset=tuple(piece.global_offset),
        shape=(1,) * piece.prepend_axis_num + tuple(piece.local_shape),
        whole=tuple(piece.global_shape),
        dtype=piece.dtype,
    )


def _serialized(value: list[Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
