"""Torch's distributed checkpoint format, written and read piece by piece: no more than one piece is in memory.

``torch.distributed.checkpoint`` plans a save before it asks for any data, and asks item by item; here the data come
from a function that is called when the item's turn has come. Reading asks for boxes of tensors, however they were cut.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
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
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

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

    Raises:
        OSError: the disk is full, or whatever else it says.
    """
    items = {_index(box): (box, data) for box, data in boxes.items()}
    writer = _Writer(folder, files)
    with _plain_errors(folder):
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

    def read(self, box: Box, into: Tensor) -> None:
        """Fill ``into``, of the box's shape, with its contents; safe to call from several threads.

        Raises:
            OSError: a file that is shorter than the checkpoint says, or cannot be read.
        """
        reader = _Reader(self.folder, self._metadata)
        with _plain_errors(self.folder):
            load(
                {},
                storage_reader=reader,
                planner=_LoadPlanner(box, self._stored(box.key), into),
                no_dist=True,
            )

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        return stored


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """torch wraps what a rank raised, with its traceback; here is one rank, and it says what was wrong first.

    (After a write that failed, torch.save complains of its own position in the file.)
    """
    try:
        yield
    except CheckpointException as error:
        (cause, _) = next(iter(error.failures.values()))
        while cause.__context__ is not None:
            cause = cause.__context__
        raise OSError(f"{folder}: {cause}") from error


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


class _Writer(FileSystemWriter):
    """Several files at a time. The base class's own threads lose what is raised in them, a full disk for one."""

    def __init__(self, folder: Path, files: int) -> None:
        super().__init__(folder, single_file_per_rank=True, thread_count=1, sync_files=True)
        self._files = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shares: list[list[WriteItem]] = [[] for _ in range(min(self._files, len(plan.items)))]
        sizes = [0] * len(shares)
        for item in sorted(plan.items, key=_size, reverse=True):
            least = sizes.index(min(sizes))
            shares[least].append(item)
            sizes[least] += _size(item)

        def write_one(number: int, items: list[WriteItem]) -> list[WriteResult]:
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            return super(_Writer, self).write_data(part, planner).wait()

        with ThreadPoolExecutor(max(1, len(shares))) as pool:
            written = list(pool.map(write_one, range(len(shares)), shares))
        results: Future[list[WriteResult]] = Future()
        results.set_result([result for part in written for result in part])
        return results


def _size(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


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
