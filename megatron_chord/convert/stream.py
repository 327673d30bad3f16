"""Torch's distributed checkpoint format, written and read piece by piece: no more than one piece is in memory.

``torch.distributed.checkpoint`` plans a save before it asks for any data, and asks item by item; here the data come
from a function that is called when the item's turn has come. Reading asks for boxes of tensors, however they were cut.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

METADATA = ".metadata"


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a checkpoint's tensor."""

    key: str
    """The tensor's name in the checkpoint."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(
    folder: Path,
    boxes: Mapping[Box, Callable[[], Tensor]],
    *,
    objects: Mapping[str, bytes] | None = None,
    files: int = 1,
) -> None:
    """Write a checkpoint whose boxes fill their tensors; each function is called once, when its box is written.

    Args:
        objects: what stands beside the tensors, serialised.
        files: how many are written at the same time, each by a thread of its own with one box in memory.
    """
    items = {_index(box): (box, data) for box, data in boxes.items()}
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=files, sync_files=True)
    save({}, storage_writer=writer, planner=_SavePlanner(items, objects or {}), no_dist=True)


class Checkpoint:
    """A checkpoint on disk: what is in it, and boxes of it on request."""

    def __init__(self, folder: Path) -> None:
        """ValueError when the folder holds no readable checkpoint."""
        self.folder = folder
        self._metadata = read_metadata(folder)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """(key, whole shape, dtype) of every tensor."""
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                yield key, tuple(stored.size), stored.properties.dtype

    def read(self, box: Box) -> Tensor:
        """The box's contents, in the stored dtype."""
        stored = self._metadata.state_dict_metadata[box.key]
        assert isinstance(stored, TensorStorageMetadata)
        into = torch.empty(box.shape, dtype=stored.properties.dtype)
        reader = _Reader(self.folder, self._metadata)
        load({}, storage_reader=reader, planner=_LoadPlanner(box, stored, into), no_dist=True)
        return into


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's own description, unpickled with torch's plain metadata classes and nothing else.

    Raises:
        ValueError: no such file, or one that asks for any other class.
    """
    path = folder / METADATA
    try:
        found = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise ValueError(f"{folder} is no distributed checkpoint: {METADATA} is not there") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path} is no checkpoint's metadata, but a {type(found).__name__}")
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Checkpoints travel, and a pickle can name any function: only data classes of the format are let through."""

    _ALLOWED = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )),
            # Megatron-Core keeps its plans beside the description.
            *(("torch.distributed.checkpoint.planner", name) for name in (
                "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("collections", "OrderedDict"),
        }
    )  # fmt: skip

    def find_class(self, module_name: str, global_name: str) -> Any:
        named = (module_name, global_name)
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if named not in self._ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class _SavePlanner(DefaultSavePlanner):
    def __init__(
        self,
        items: Mapping[MetadataIndex, tuple[Box, Callable[[], Tensor]]],
        objects: Mapping[str, bytes],
    ) -> None:
        super().__init__()
        self._items, self._objects = items, objects

    def create_local_plan(self) -> SavePlan:
        tensors = [_write_item(index, box) for index, (box, _) in self._items.items()]
        objects = [
            WriteItem(
                index=MetadataIndex(key),
                type=WriteItemType.BYTE_IO,
                bytes_io_data=BytesIOWriteData(nbytes=len(content)),
            )
            for key, content in self._objects.items()
        ]
        self.plan = SavePlan([*tensors, *objects], planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        box, data = self._items[write_item.index]
        return data().reshape(box.shape).to(box.dtype).contiguous()


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, box: Box, stored: TensorStorageMetadata, into: Tensor) -> None:
        super().__init__()
        self._box, self._stored, self._into = box, stored, into

    def create_local_plan(self) -> LoadPlan:
        chunk = ChunkStorageMetadata(torch.Size(self._box.offset), torch.Size(self._box.shape))
        return LoadPlan(create_read_items_for_chunk_list(self._box.key, self._stored, [chunk]))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        into = self._into
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            into = into.narrow(axis, start, length)
        return into

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _Reader(FileSystemReader):
    """Reads what has been checked already, not the pickle again."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _index(box: Box) -> MetadataIndex:
    return MetadataIndex(box.key, torch.Size(box.offset))


def _write_item(index: MetadataIndex, box: Box) -> WriteItem:
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)),
            properties=TensorProperties(dtype=box.dtype),
            size=torch.Size(box.whole),
        ),
    )
