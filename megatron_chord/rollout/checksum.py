"""Fingerprints of tensors, computed where the tensor lies: the proof that a server holds what the trainer sent.

The bytes are read as 64-bit words w_i, in rows of 256 KiB. Of each row two sums modulo 2**64 are kept, of r_i w_i and
of r_i v_i: v_i are the words of the same bytes read 4 bytes further on (the row's first 4 bytes come last), and r_i
are odd numbers that look random. Each 32-bit half is the lower half of a word in one of the two sums.

Damage within one word always changes the first sum, since its multiplier is odd. Any other damage escapes for at most
one in 2**32 choices of multipliers: a half that differs is the lower one in some sum, so the difference d of its word
is no multiple of 2**32, and at most one in 2**32 odd numbers r gives r d the one value modulo 2**64 that would cancel
the rest (multilinear hashing: Lemire and Kaser, arXiv 1202.4961). It is a guard against accidents, not against an
adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_ROW = 1 << 15
"""Words."""
_ROWS_AT_ONCE = {"cpu": 4, "cuda": 512}
"""On a CPU the temporary, 1 MiB, stays in the cache; on a GPU the two are 128 MiB each."""


def checksum(tensor: Tensor) -> list[tuple[int, int]]:
    """Two signed 64-bit integers a row of the tensor's bytes in row-major order; any dtype, shape and stride."""
    first, second = _sums(tensor.detach()).tolist()
    return list(zip(first, second, strict=True))


def fingerprint(name: str, tensor: Tensor) -> str:
    """32 hex digits over the name, dtype, shape and content of a tensor."""
    return fingerprints([(name, tensor)])[0]


def fingerprints(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """``fingerprint`` of each; all on one device, from which one copy is made instead of one per tensor."""
    if not named:
        return []
    sums = [_sums(tensor.detach()) for _, tensor in named]
    parts = torch.cat(sums, dim=1).cpu().split([rows.shape[1] for rows in sums], dim=1)
    return [_digest(name, tensor, part) for (name, tensor), part in zip(named, parts, strict=True)]


def _digest(name: str, tensor: Tensor, sums: Tensor) -> str:
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(sums.numpy().tobytes())
    return digest.hexdigest()[:32]


def _sums(tensor: Tensor) -> Tensor:
    """int64 [2, rows] on the tensor's device."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    num_whole = data.numel() // (8 * _ROW)
    sums = data.new_empty(2, -(-data.numel() // (8 * _ROW)), dtype=torch.int64)
    rows_at_once = _ROWS_AT_ONCE.get(data.device.type, 1)
    if num_whole:
        rows = _words(data[: num_whole * 8 * _ROW]).view(-1, _ROW)
        for start in range(0, num_whole, rows_at_once):
            block = rows[start : start + rows_at_once]
            _sum_rows(block, out=sums[:, start : start + len(block)])
    if num_whole < sums.shape[1]:
        _sum_rows(_words(data[num_whole * 8 * _ROW :]).view(1, -1), out=sums[:, num_whole:])
    return sums


def _sum_rows(rows: Tensor, out: Tensor) -> None:
    """int64 [rows, words] -> int64 [2, rows]."""
    multipliers = _multipliers(rows.device)[: rows.shape[1]]
    rotated = rows.view(torch.int32).roll(-1, dims=1).view(torch.int64)
    for i, words in enumerate((rows, rotated)):
        if rows.device.type == "cpu":  # needs no temporary; CUDA has no such product of integers
            torch.mv(words, multipliers, out=out[i])
        else:
            torch.sum(words * multipliers, dim=1, out=out[i])


def _words(data: Tensor) -> Tensor:
    """The bytes as int64, zeros appended to a multiple of eight (the length is part of the digest's shape)."""
    tail = -data.numel() % 8
    if tail:
        data = torch.cat([data, data.new_zeros(tail)])
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd int64 [row]: SplitMix64's first numbers (Steele, Lea and Flood, OOPSLA 2014), the last bit set."""
    z = torch.arange(1, _ROW + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, 31)) | 1


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left; torch's own shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
