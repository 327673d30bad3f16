"""The layout of a model's parameters in Megatron-Core's distributed checkpoint, found without allocating the model.

The model chunks are built on the meta device for one rank. Megatron's ``sharded_state_dict`` then gives the keys and
offsets under which it would save them. The format reshards, so any parallel layout can load what one rank saves.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.model.build import build_chunks, transformer_config
from megatron_chord.runtime import parallel as runtime
from megatron_chord.weights.mapping import Entry
from megatron_chord.weights.torch_dist import Box

PIECE_BYTES = 128 * 2**20
"""Size of the pieces that are read and written."""
_METADATA = {"singleton_local_shards": False}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a parameter, and the checkpoint's box with these rows."""

    start: int
    stop: int
    box: Box


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One parameter: its entry in the table, and its boxes in the checkpoint."""

    entry: Entry
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    """One box; for the stacked projections of a gated MLP one for each, concatenated by rows."""

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """The parameter's dtype in a model of this dtype."""
        return self.entry.rule.dtype or of_model

    def size(self, of_model: torch.dtype) -> int:
        """The parameter's size in bytes, in a model of this dtype."""
        return math.prod(self.shape) * self.dtype(of_model).itemsize

    def pieces(self, max_bytes: int) -> Iterator[Piece]:
        """Split the parameter, in order, into pieces of at most ``max_bytes`` (or of the rows that must stay
        together)."""
        rows, unit = self.shape[0], self.entry.rule.transform.unit
        row_bytes = math.prod(self.shape[1:]) * self.boxes[0].dtype.itemsize
        step = max(unit, max_bytes // row_bytes // unit * unit)
        each = rows // len(self.boxes)
        for first in range(0, rows, each):
            for start in range(first, first + each, step):
                stop = min(start + step, first + each)
                yield Piece(start=start, stop=stop, box=self.box(start, stop))

    def box(self, start: int, stop: int) -> Box:
        """The box of rows [start, stop). All rows must lie in the same box."""
        each = self.shape[0] // len(self.boxes)
        whole, first = self.boxes[start // each], start // each * each
        axis = len(whole.shape) - len(self.shape)  # in a checkpoint, experts are an additional leading axis
        offset, shape = list(whole.offset), list(whole.shape)
        offset[axis] += start - first
        shape[axis] = stop - start
        return replace(whole, offset=tuple(offset), shape=tuple(shape))


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    parameters: tuple[Stored, ...]
    """The parameters, with the vocabulary's padding rows of a layout of one rank."""
    objects: tuple[tuple[str, bytes], ...]
    """The objects that Megatron saves in addition to tensors, by key, and needs when it loads."""


def checkpoint_layout(shape: ModelShape) -> CheckpointLayout:
    """The checkpoint's layout for a model of this shape, in fp32; starts a process group of one if there is none."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    alone = ParallelConfig()
    if not parallel_state.is_initialized() or torch.distributed.get_world_size() > 1:
        runtime.start(alone, seed=0)
    config = transformer_config(shape, ModelConfig(path=Path("."), dtype="fp32"), alone)
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
    return CheckpointLayout(parameters=tuple(parameters), objects=tuple(objects))


def without_padding(stored: Stored, vocab_size: int) -> Stored:
    """The parameter without the vocabulary's padding rows, which depend on the layout that wrote it."""
    if not stored.entry.rule.vocab:
        return stored
    shape = (vocab_size, *stored.shape[1:])
    return replace(stored, shape=shape, boxes=tuple(replace(box, shape=shape) for box in stored.boxes))


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
