"""Buckets of weights: groups of named tensors with a limited total size, described in plain JSON.

A push of weights sends bucket after bucket. The trainer (``transports``, ``sync``) and the server (``vllm_engine``) use
the same functions here, because both must use the same memory layout. Imports only torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor

from megatron_chord.rollout.checksum import fingerprints

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
_ALIGNMENT = 256
"""Bytes. A view of a buffer with another dtype must begin at a multiple of that dtype's size."""


@dataclass(frozen=True)
class TensorInfo:
    """The description of one tensor of a bucket that the trainer sends to the server."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(value: dict) -> TensorInfo:
        """Raises ValueError if a field is missing or the dtype is not one of ``DTYPES``."""
        if value.keys() != {"name", "dtype", "shape", "fingerprint"} or value["dtype"] not in DTYPES:
            raise ValueError(f"not the description of a tensor: {value}")
        return TensorInfo(value["name"], value["dtype"], tuple(value["shape"]), value["fingerprint"])


def in_buckets(
    named_tensors: Iterable[tuple[str, Tensor]], max_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Group consecutive tensors into buckets of at most `max_bytes`. A larger tensor gets a bucket of its own."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def describe(bucket: Sequence[tuple[str, Tensor]]) -> list[TensorInfo]:
    """The tensors' names, dtypes, shapes and fingerprints. Raises ValueError on a dtype that is not in ``DTYPES``."""
    for name, tensor in bucket:
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; weights travel as one of {', '.join(DTYPES)}")
    return [
        TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest)
        for (name, tensor), digest in zip(bucket, fingerprints(bucket), strict=True)
    ]


def verify(infos: Sequence[TensorInfo], tensors: Sequence[Tensor]) -> None:
    """Compare tensors with their descriptions. Raises ValueError with the names of those that differ."""
    received = [(info.name, tensor) for info, tensor in zip(infos, tensors, strict=True)]
    wrong = [
        info.name
        for info, digest in zip(infos, fingerprints(received), strict=True)
        if digest != info.fingerprint
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(infos)} tensors arrived damaged: {', '.join(wrong[:8])}")


def flat_size(infos: Iterable[TensorInfo]) -> int:
    """Size in bytes of the buffer that ``flatten`` fills."""
    return sum(_aligned(info.num_bytes) for info in infos)


def flatten(tensors: Iterable[Tensor], out: Tensor) -> None:
    """Copy the tensors one after another into `out` (uint8), each at an aligned offset."""
    offset = 0
    for tensor in tensors:
        out[offset : offset + tensor.nbytes].copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
        offset += _aligned(tensor.nbytes)


def unflatten(infos: Iterable[TensorInfo], buffer: Tensor) -> list[Tensor]:
    """Views of `buffer` (uint8): the inverse of ``flatten``."""
    tensors, offset = [], 0
    for info in infos:
        data = buffer[offset : offset + info.num_bytes]
        tensors.append(data.view(DTYPES[info.dtype]).view(info.shape))
        offset += _aligned(info.num_bytes)
    return tensors


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
