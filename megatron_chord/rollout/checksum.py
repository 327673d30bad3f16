"""Fingerprints of tensors, computed where the tensor lies: the proof that a server holds what the trainer sent.

The bytes are read as 64-bit words. Each word is mixed (multiplied by an odd constant, folded onto itself), and two
sums modulo 2**64 are kept: of the mixed words, and of the mixed words times their position. Without the mixing two
flipped sign bits an even distance apart would cancel in both sums. A flipped bit, swapped or permuted content and a
shifted or zeroed range all change the pair. It is a guard against accidents, not against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_WORDS_PER_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""On a CPU a chunk and its temporaries stay in the cache (0.5 MiB each); on a GPU each temporary is 128 MiB."""


def checksum(tensor: Tensor) -> tuple[int, int]:
    """Two signed 64-bit integers over the tensor's bytes in row-major order; any dtype, shape, stride and device."""
    return checksums([tensor])[0]


def checksums(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """``checksum`` of each; all on one device, from which one copy is made instead of one per tensor."""
    sums = [_sums(tensor.detach()) for tensor in tensors]
    return [(int(plain), int(weighted)) for plain, weighted in torch.stack(sums).tolist()] if sums else []


def fingerprint(name: str, tensor: Tensor) -> str:
    """32 hex digits over the name, dtype, shape and content of a tensor."""
    return fingerprints([(name, tensor)])[0]


def fingerprints(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """``fingerprint`` of each, with one copy from the device."""
    return [
        _digest(name, tensor, sums)
        for (name, tensor), sums in zip(named, checksums([tensor for _, tensor in named]), strict=True)
    ]


def _digest(name: str, tensor: Tensor, sums: tuple[int, int]) -> str:
    text = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{sums[0]}|{sums[1]}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sums(tensor: Tensor) -> Tensor:
    """int64 [2] on the tensor's device."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    step = _WORDS_PER_CHUNK.get(tensor.device.type, 1 << 16)
    positions = torch.arange(1, min(step, data.numel() // 8 + 1) + 1, device=data.device)
    total = torch.zeros(2, dtype=torch.int64, device=data.device)
    for index, chunk in enumerate(data.split(step * 8)):
        mixed = _words(chunk) * _ODD
        mixed ^= mixed >> 32
        plain = mixed.sum()
        weighted = mixed.mul_(positions[: mixed.numel()]).sum()
        total[0] += plain
        total[1] += weighted + plain * (index * step)
    return total


def _words(chunk: Tensor) -> Tensor:
    """The bytes as int64, zeros appended to a multiple of eight (the length is part of the digest's shape)."""
    tail = -chunk.numel() % 8
    if tail:
        chunk = torch.cat([chunk, chunk.new_zeros(tail)])
    elif chunk.storage_offset() % 8:
        chunk = chunk.clone()
    return chunk.view(torch.int64)
