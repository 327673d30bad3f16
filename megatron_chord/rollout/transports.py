"""The transports that bring a bucket of weights from a trainer rank to the server's workers.

A sender's transport publishes a bucket as a parcel. Two parcels may exist at a time: the next one is made while the
server receives the previous one.

    parcel = transport.publish(bucket, infos)   ``parcel.fields``: what the server needs to find the bucket
    parcel.transmit(given_up)                   called while the announcement is sent: sends the data, if not shared
    parcel.release()                            called when the server has received it, also after a failure

``file``       for a server without a GPU on the same machine
``broadcast``  for a server on other GPUs (NCCL) or in other processes without a GPU (gloo)
``ipc``        for a server on the same GPUs; NCCL does not allow two ranks on one GPU
``gloo``       every worker receives every byte over TCP and main memory. It is the slowest, but works everywhere

On several nodes with servers beside the ranks, ``rollout.relay`` brings each bucket to one rank of each node, which
passes it on by ``ipc`` or ``file``. For this, these two transports also offer a parcel's memory before it has content:

    parcel = transport.make_room(num_bytes)     ``parcel.memory``: to be filled before the bucket is announced
"""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_chord.rollout.buckets import TensorInfo, flat_size, flatten
from megatron_chord.rollout.sender_group import SenderGroup

_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*(True|true|1)\b")
Bucket = Sequence[tuple[str, Tensor]]


class Parcel(Protocol):
    @property
    def fields(self) -> dict: ...

    def transmit(self, given_up: Callable[[], bool]) -> None: ...

    def release(self) -> None: ...


class Transport(Protocol):
    def publish(self, bucket: Bucket, infos: Sequence[TensorInfo]) -> Parcel: ...


class FileTransport:
    """Two alternating buffers: files in a private folder in shared memory, mapped by sender and workers.

    Both sides map a buffer once and use it for all pushes, because new pages cost several times as much as the copy
    into them. The file is unlinked when the server has received the first bucket, so that it does not outlive the
    processes.
    """

    def __init__(self, folder: Path, sender: int) -> None:
        self._folder, self._sender, self._count = folder, sender, 0
        self._buffers: list[tuple[Path, Tensor] | None] = [None, None]

    def publish(self, bucket: Bucket, infos: Sequence[TensorInfo]) -> _File:
        parcel = self.make_room(flat_size(infos))
        flatten((tensor for _, tensor in bucket), out=parcel.memory)
        return parcel

    def make_room(self, num_bytes: int) -> _File:
        """A parcel without content. Raises OSError if shared memory has no room for it."""
        turn, self._count = self._count % 2, self._count + 1
        mapped = self._buffers[turn]
        if mapped is None or mapped[1].numel() < num_bytes:
            mapped = _make_mapped_file(self._folder, f"weights-{self._sender}-", num_bytes)
            self._buffers[turn] = mapped
        return _File(mapped[0], 2 * self._sender + turn, mapped[1])


def _make_mapped_file(folder: Path, prefix: str, num_bytes: int) -> tuple[Path, Tensor]:
    """Make a file with a new name and map it (uint8). Returns its path and the tensor.

    Raises OSError if there is no space for it; otherwise the first write would kill the process.
    """
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=folder)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(descriptor)
    return Path(name), _map(Path(name), num_bytes)


def _map(path: Path, num_bytes: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8)


@dataclass(frozen=True)
class _File:
    path: Path
    buffer: int
    memory: Tensor

    @property
    def fields(self) -> dict:
        return {"path": str(self.path), "buffer": self.buffer}

    def transmit(self, given_up: Callable[[], bool]) -> None:
        pass

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


class BucketFiles:
    """A worker's side of ``FileTransport``: maps each sender's buffer when it is used for the first time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[int, tuple[Path, Tensor]] = {}

    def find(self, path: Path, buffer: int, num_bytes: int) -> Tensor:
        """A view (uint8) of ``num_bytes`` bytes. The sender overwrites them after the server has replied.

        Raises ValueError if the file is not in the run's folder or is too short.
        """
        mapped = self._mapped.get(buffer)
        if mapped is None or mapped[0] != path:
            if path.resolve().parent != self._folder.resolve():
                raise ValueError(f"{path} does not lie in the run's folder {self._folder}")
            mapped = self._mapped[buffer] = (path, _map(path, path.stat().st_size))
        if mapped[1].numel() < num_bytes:
            raise ValueError(f"{path} has {mapped[1].numel()} bytes, but {num_bytes} were announced")
        return mapped[1][:num_bytes]


class BroadcastTransport:
    """Broadcasts one flat buffer for each bucket over a process group of this sender and all workers."""

    def __init__(self, group: SenderGroup, sender: int, device: torch.device, timeout_s: float) -> None:
        self._group, self._sender, self._device, self._timeout_s = group, sender, device, timeout_s

    def publish(self, bucket: Bucket, infos: Sequence[TensorInfo]) -> _Broadcast:
        buffer = torch.zeros(flat_size(infos), dtype=torch.uint8, device=self._device)
        flatten((tensor for _, tensor in bucket), out=buffer)
        return _Broadcast(buffer, self._group, self._sender, self._timeout_s)


@dataclass
class _Broadcast:
    buffer: Tensor | None
    group: SenderGroup
    sender: int
    timeout_s: float

    @property
    def fields(self) -> dict:
        return {"source": self.sender}

    def transmit(self, given_up: Callable[[], bool]) -> None:
        assert self.buffer is not None
        self.group.broadcast(self.buffer, timeout_s=self.timeout_s, given_up=given_up)

    def release(self) -> None:
        self.buffer = None


class IpcTransport:
    """Two alternating staging buffers on this GPU. Each is exported once to each worker, which keeps it open.

    A buffer must not be exported again for every bucket: each export wraps it once more (torch/csrc/CudaIPCTypes.h,
    CudaIPCSentData.original_ptr_), and freeing it after several hundred pushes would overflow the stack.

    A new connection uses the buffers of the one before it. torch does not free an exported buffer whose receiver was
    killed: it waits for ever until the receiver has closed it (torch/csrc/CudaIPCTypes.cpp, CudaIPCSentDataLimbo).
    """

    def __init__(
        self, sender: int, num_workers: int, device: torch.device, buffers: list[Tensor | None] | None = None
    ) -> None:
        """``buffers``: the two buffers (uint8) of earlier connections, which no worker reads any more. None for one
        that does not exist yet; it is added to the list when it is made."""
        self._sender, self._num_workers, self._device = sender, num_workers, device
        self._buffers: list[Tensor | None] = [None, None] if buffers is None else buffers
        self._handles: list[list[dict] | None] = [None, None]
        """For each buffer one IPC handle for each worker; None before the first use in this connection."""
        self._slot = 0

    def publish(self, bucket: Bucket, infos: Sequence[TensorInfo]) -> _Handles:
        parcel = self.make_room(flat_size(infos))
        flatten((tensor for _, tensor in bucket), out=parcel.memory)
        torch.cuda.synchronize(self._device)
        return parcel

    def make_room(self, num_bytes: int) -> _Handles:
        """A parcel without content. Raises torch.OutOfMemoryError if the GPU has no room for it."""
        self._slot = 1 - self._slot
        buffer, handles = self._buffers[self._slot], self._handles[self._slot]
        if buffer is None or buffer.numel() < num_bytes:
            with without_expandable_segments():
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            handles = None
        if handles is None:
            handles = [export_cuda_buffer(buffer) for _ in range(self._num_workers)]
        self._buffers[self._slot], self._handles[self._slot] = buffer, handles
        fields = {"source": self._sender, "slot": self._slot, "handles": handles}
        return _Handles(fields, buffer)


@dataclass(frozen=True)
class _Handles:
    fields: dict
    memory: Tensor

    def transmit(self, given_up: Callable[[], bool]) -> None:
        pass

    def release(self) -> None:
        pass


@contextmanager
def without_expandable_segments() -> Iterator[None]:
    """Allocate GPU memory that other processes can open, also with ``expandable_segments:True``.

    torch shares an expandable segment by file descriptors, which the receiver takes from the sender
    (c10/cuda/CUDACachingAllocator.cpp, ExpandableSegment::fromShared: pidfd_getfd). The kernel allows this only to a
    process that may trace the sender. By default Ubuntu lets a process trace its descendants alone, and a server is no
    ancestor of the ranks.
    """
    read: Any = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    settings = "" if read is None else read()
    plain = _EXPANDABLE.sub("expandable_segments:False", settings)
    if plain == settings:
        yield
        return
    torch._C._accelerator_setAllocatorSettings(plain)
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)


def export_cuda_buffer(buffer: Tensor) -> dict:
    """A CUDA IPC handle of a uint8 buffer as JSON values, for exactly one receiver."""
    _, handle, size, offset, counter, counter_offset, event, _ = buffer.untyped_storage()._share_cuda_()
    return {
        "gpu": str(torch.cuda.get_device_properties(buffer.device).uuid),
        "handle": _text(handle),
        "size": size,
        "offset": offset,
        "counter": _text(counter),
        "counter_offset": counter_offset,
        "event": _text(event),
    }


class CudaImports:
    """A worker's side of ``IpcTransport``: keeps each sender's buffer open until the sender replaces it.

    torch expects exactly one opening and one closing of each export. A worker maps the buffer into the address space of
    its own GPU if this GPU can access the sender's (``_opening_device``).
    """

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], tuple[dict, Tensor]] = {}

    def copy(self, place: tuple[int, int], handle: dict, num_bytes: int, device: torch.device) -> Tensor:
        """Copy the first ``num_bytes`` of a buffer to `device`. Raises ValueError if the sender's GPU is not visible.

        Args:
            place: index of the sender, and index (0 or 1) of its buffer.
        """
        if place not in self._open or self._open[place][0] != handle:
            self._open.pop(place, None)
            self._open[place] = (handle, _open_cuda_buffer(handle, device))
        view = self._open[place][1]
        if view.numel() < num_bytes:
            raise ValueError(f"the sender exported {view.numel()} bytes, but {num_bytes} were announced")
        copy = view[:num_bytes].to(device, copy=True)
        torch.cuda.synchronize(device)
        return copy


def _open_cuda_buffer(handle: dict, own: torch.device) -> Tensor:
    """The sender's buffer (uint8). It is complete when it is announced, so that no event of the sender is awaited."""
    storage = torch.UntypedStorage._new_shared_cuda(
        _opening_device(handle["gpu"], own),
        base64.b64decode(handle["handle"]),
        handle["size"],
        handle["offset"],
        base64.b64decode(handle["counter"]),
        handle["counter_offset"],
        base64.b64decode(handle["event"]),
        False,
    )
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _opening_device(sender: str, own: torch.device) -> int:
    """The number of the GPU in whose address space a worker opens a buffer of the GPU with the UUID ``sender``.

    It is the worker's own GPU if this can access the sender's. cudaIpcOpenMemHandle maps memory of any GPU of the node
    into the address space of the current device, over NVLink or PCIe. vLLM opens the buffers of its all-reduce in the
    same way (distributed/device_communicators/all_reduce_utils.py). Otherwise it is the sender's GPU, on which torch
    then creates a CUDA context of this worker, of 0.3 to 0.5 GB.

    Raises ValueError if the sender's GPU is not visible.
    """
    gpus = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    if sender not in gpus:
        raise ValueError(f"the sender's GPU {sender} is not among this worker's: {', '.join(gpus)}")
    number = torch.cuda.current_device() if own.index is None else own.index
    is_near = gpus[sender] == number or torch.cuda.can_device_access_peer(number, gpus[sender])
    return number if is_near else gpus[sender]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
