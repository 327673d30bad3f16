"""Reads and writes torch's distributed checkpoint format in streaming mode: only one part is in memory at a time.

torch's writer requests the data of a save item by item. Here a function computes an item's data when it is requested.
Each process writes its part by itself, and the first one then describes the whole. A read requests boxes of tensors; a
box need not be one that was written. Threads of this process write the files. Reading executes nothing: the description
and the objects are pickles, and only plain data is allowed in them.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
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
    LoadPlanner,
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

from megatron_chord.files import write_durably

METADATA = ".metadata"
COMMON = "common.pt"
_BACKEND = "metadata.json"
COMMON_FILES = (COMMON, _BACKEND)
"""What ``write_common`` writes."""
_FORBIDDEN_GLOBAL = re.compile(r"nsupported (?:global: )?GLOBAL (\S+)")
"""The error text of torch.load for a class or function that is not allowed (torch/_weights_only_unpickler.py)."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangular part of a checkpoint's tensor."""

    key: str
    """The tensor's name in the checkpoint."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What one process has written of a checkpoint. It can be pickled, and sent to the process that finishes."""

    items: list[WriteItem]
    results: list[WriteResult]

    @property
    def files(self) -> set[str]:
        """Names of the files."""
        return {result.storage_data.relative_path for result in self.results}


def write(
    folder: Path,
    boxes: Mapping[Box, Callable[[], Tensor]],
    *,
    objects: Mapping[str, bytes] | None = None,
    files: int = 1,
) -> None:
    """Write a whole checkpoint with this process, as ``write_part`` and ``write_description`` do together."""
    write_description(folder, [write_part(folder, boxes, objects=objects, files=files)])


def write_part(
    folder: Path,
    boxes: Mapping[Box, Callable[[], Tensor]],
    *,
    objects: Mapping[str, bytes] | None = None,
    files: int = 1,
    rank: int = 0,
    is_given_up: Callable[[], bool] = lambda: False,
) -> Written:
    """Write the part of a checkpoint that this process has. The data is on the disk when this returns (fsync).

    Each function of ``boxes`` is called once, when its box is written. No collectives.

    Args:
        objects: further serialised objects by key.
        files: number of files that are written in parallel, each by a thread with one box in memory.
        rank: a number that no other process uses; the files' names begin with it.
        is_given_up: called before each box. If it returns true, writing ends with an error.
    Raises:
        OSError: writing failed, for example because the disk is full. All threads have ended.
    """
    items = {_index(box): (box, data) for box, data in boxes.items()}
    planner = _SavePlanner(items, objects or {}, is_given_up)
    writer = _Writer(folder, files)
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
    try:
        plan = writer.prepare_local_plan(planner.create_local_plan())
        return Written(list(plan.items), writer.write_data(plan, planner).wait())
    except Exception as error:
        raise OSError(f"{folder} cannot be written: {reason(error)}") from error


def write_description(folder: Path, parts: Sequence[Written]) -> None:
    """Write the description of a checkpoint whose ``parts`` all processes have written. Then it is complete.

    Raises:
        RuntimeError: the parts leave out an element of a tensor, or contain it twice.
        OSError: writing failed.
    """
    plans = [SavePlan(part.items) for part in parts]
    _, metadata = create_default_global_save_plan(plans, rewrite_index_hints=False)
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            _check_tiling(key, stored)
    try:
        FileSystemWriter(folder, sync_files=True).finish(metadata, [part.results for part in parts])
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {reason(error)}") from error


def is_tiling(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """True if boxes (offset, shape) together contain each element of a tensor exactly once, and nothing else.

    The time is linear in the number of boxes. torch compares each box with all that overlap it on one axis, and
    took 7 to 20 times as long for a model on 512 ranks (``benchmarks/save_plan.py``).

    Every corner of a box counts +1 or -1: -1 to the number of axes on which it is the far end. These counts are the
    mixed differences of the function that says how many boxes contain an element, so they determine it. Two sets of
    boxes therefore contain each element equally often if and only if their sums at each corner are equal.
    """
    filled = [(tuple(offset), tuple(sizes)) for offset, sizes in boxes if 0 not in sizes]
    if 0 in shape:
        return not filled
    if not shape:
        return len(filled) == 1
    size = torch.tensor(tuple(shape))
    near, far = _ends(len(shape), filled)
    if bool((near < 0).any()) or bool((far > size).any()):
        return False
    near = torch.cat(
        [near, torch.zeros(1, len(shape), dtype=near.dtype)]
    )  # the last box is the tensor, subtracted
    far = torch.cat([far, size[None]])
    weight = torch.ones(len(near), dtype=torch.int64)
    weight[-1] = -1
    # A corner is numbered like an element of a tensor that is longer by one on each axis.
    strides = torch.ones(len(shape), dtype=torch.int64)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * (shape[axis + 1] + 1)
    numbers, weights = [], []
    for ends in itertools.product((False, True), repeat=len(shape)):
        numbers.append((torch.where(torch.tensor(ends), far, near) * strides).sum(1))
        weights.append(weight * (-1) ** sum(ends))
    _, places = torch.cat(numbers).unique(return_inverse=True)
    sums = torch.zeros(len(places), dtype=torch.int64).index_add_(0, places, torch.cat(weights))
    return not bool(sums.any())


def _check_tiling(key: str, stored: TensorStorageMetadata) -> None:
    if not is_tiling(stored.size, _boxes(stored)):
        raise RuntimeError(
            f"the {len(stored.chunks)} written parts of {key} {tuple(stored.size)} do not contain each of its elements "
            "exactly once"
        )


def write_common(folder: Path, common: Mapping[str, Any]) -> None:
    """Write the files that a Megatron-Core checkpoint has in addition to torch's: common objects and format names."""
    content = io.BytesIO()
    torch.save(dict(common), content)
    write_durably(folder / COMMON, content.getbuffer())
    sharded = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    plain = {"common_backend": "torch", "common_backend_version": 1}
    write_durably(folder / _BACKEND, json.dumps(sharded | plain).encode())


class Checkpoint:
    """A checkpoint on disk: lists its tensors and reads boxes on request."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint. Raises ValueError if the folder has no readable one."""
        self.folder = folder
        self._metadata = read_metadata(folder)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Yield (key, full shape, dtype) of every tensor."""
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                yield key, tuple(stored.size), stored.properties.dtype

    def read(self, box: Box, into: Tensor) -> None:
        """Read a box into ``into``, which has the box's shape. Usable from several threads.

        Raises:
            OSError: a file is too short or cannot be read.
        """
        self.read_all([(box, into)])

    def read_all(self, wanted: Iterable[tuple[Box, Tensor]]) -> None:
        """Read many boxes, file by file. A box may be larger than the stored tensor; the rest of it does not change.

        Raises:
            ValueError: a tensor is missing or has another number of dimensions.
            OSError: a file is too short or cannot be read.
        """
        targets: dict[MetadataIndex, list[Tensor]] = defaultdict(list)
        items: list[ReadItem] = []
        ends: dict[str, tuple[Tensor, Tensor]] = {}
        for box, into in wanted:
            stored = self._metadata.state_dict_metadata.get(box.key)
            if not isinstance(stored, TensorStorageMetadata) or len(stored.size) != len(box.shape):
                found = "no such tensor" if stored is None else f"{getattr(stored, 'size', 'an object')}"
                raise ValueError(
                    f"{self.folder}: {box.key} should have {len(box.shape)} axes, but is {found}"
                )
            if not targets[_index(box)]:
                chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
                if box.key not in ends:
                    ends[box.key] = _ends(len(box.shape), _boxes(stored))
                near = replace(stored, chunks=[stored.chunks[at] for at in _overlapping(box, *ends[box.key])])
                items += create_read_items_for_chunk_list(box.key, near, [chunk])
            targets[_index(box)].append(into)
        _Reader(self.folder, self._metadata).read_data(LoadPlan(items), _LoadPlanner(targets))
        for first, *others in targets.values():
            for other in others:
                other.copy_(first)

    def object(self, key: str) -> Any:
        """Read an object that was saved in addition to the tensors. It may contain only plain data and tensors.

        Raises:
            ValueError: it is missing, or contains more than plain data.
        """
        place = (self._metadata.storage_data or {}).get(MetadataIndex(key))
        if place is None:
            raise ValueError(f"{self.folder} has no {key}")
        path = self.folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            return load_plain(io.BytesIO(file.read(place.length)), f"{path}: {key}")


def load_plain(source: Path | IO[bytes], name: str | None = None) -> Any:
    """Load a file of ``torch.save`` that contains only tensors, numbers, text and containers. Nothing is executed.

    Raises:
        ValueError: it needs any other class or function, is damaged, or is missing. The message is one line that begins
            with ``name``.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{name or source} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None or error.__context__ is not None:
        earlier = error.__cause__ or error.__context__
        assert earlier is not None
        error = earlier
    text = str(error)
    forbidden = _FORBIDDEN_GLOBAL.search(text)
    if forbidden is not None:
        return f"it needs {forbidden[1]}, which is not plain data"
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)


def read_metadata(folder: Path) -> Metadata:
    """Read the checkpoint's description. Only torch's metadata classes are allowed in its pickle.

    Raises:
        ValueError: the file is missing or needs any other class.
    """
    path = folder / METADATA
    try:
        found = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a distributed checkpoint: {METADATA} is missing") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path} is not the metadata of a checkpoint but a {type(found).__name__}")
    for place in (found.storage_data or {}).values():
        if Path(place.relative_path).name != str(place.relative_path):
            raise ValueError(f"{path} refers to a file outside of its folder: {place.relative_path}")
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles only the data classes of the format. A checkpoint may come from elsewhere, and a pickle can otherwise
    call any function."""

    _ALLOWED = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )),
            # Megatron-Core stores its plans in the description.
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
            raise pickle.UnpicklingError(f"it needs {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class _SavePlanner(DefaultSavePlanner):
    def __init__(
        self,
        items: Mapping[MetadataIndex, tuple[Box, Callable[[], Tensor]]],
        objects: Mapping[str, bytes],
        is_given_up: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._items, self._objects, self._is_given_up = items, objects, is_given_up
        self.has_failed = False
        """True if a thread has failed, so that the others stop."""

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
        if self.has_failed or self._is_given_up():
            raise OSError("given up")
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        box, data = self._items[write_item.index]
        return data().reshape(box.shape).to("cpu", box.dtype).contiguous()


class _Writer(FileSystemWriter):
    """Writes several files in parallel. The base class's threads would lose exceptions, for example of a full disk."""

    def __init__(self, folder: Path, files: int) -> None:
        # Copying ahead would use a CUDA stream of the threads' current device, which is GPU 0 on every rank.
        super().__init__(
            folder, single_file_per_rank=True, thread_count=1, sync_files=True, per_thread_copy_ahead=0
        )
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
            try:
                written = list(pool.map(write_one, range(len(shares)), shares))
            except BaseException as error:
                assert isinstance(planner, _SavePlanner)
                planner.has_failed = True
                if not isinstance(error, Exception):
                    raise
                # After a failed write torch.save itself raises an error about its position in the file.
                raise OSError(reason(error)) from None
        results: Future[list[WriteResult]] = Future()
        results.set_result([result for part in written for result in part])
        return results


def _size(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, targets: Mapping[MetadataIndex, list[Tensor]]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        into = self._targets[read_item.dest_index][0]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            into = into.narrow(axis, start, length)
        return into

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _Reader(FileSystemReader):
    """Uses the metadata that was already checked instead of reading the pickle again. Its errors name the file."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder = folder
        self.set_up_storage_reader(metadata, is_coordinator=True)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            files[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in files.items():
            try:
                super().read_data(LoadPlan(items), planner)
            except Exception as error:
                raise OSError(f"{self._folder / name} cannot be read: {reason(error)}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _boxes(stored: TensorStorageMetadata) -> list[tuple[torch.Size, torch.Size]]:
    return [(chunk.offsets, chunk.sizes) for chunk in stored.chunks]


def _ends(axes: int, boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """The first index of each box (offset, shape), and the index after its last. [boxes, axes] int64"""
    near, sizes = (
        torch.tensor([tuple(box[part]) for box in boxes], dtype=torch.int64).reshape(len(boxes), axes)
        for part in (0, 1)
    )
    return near, near + sizes


def _overlapping(box: Box, near: Tensor, far: Tensor) -> list[int]:
    """The numbers of the chunks that overlap the box. torch's search for them compares each box with many chunks."""
    offset = torch.tensor(box.offset, dtype=torch.int64)
    overlaps = (near < offset + torch.tensor(box.shape, dtype=torch.int64)) & (far > offset)
    return overlaps.all(1).nonzero()[:, 0].tolist()


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
