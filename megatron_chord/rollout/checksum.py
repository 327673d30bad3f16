"""Fingerprints of tensors, computed on the tensor's device. They prove that a server holds what the trainer sent.

The bytes are read as 64-bit words w_i, in rows of 256 KiB. Each row has two sums modulo 2**64: sum of r_i w_i and sum
of r_i v_i. The v_i are the words of the same row rotated by 4 bytes (its first 4 bytes come last). The r_i are
pseudo-random odd numbers. So each 32-bit half of a word is the lower half of a word in one of the two sums.

An error within one word always changes the first sum, because its multiplier is odd. Any other error is missed for at
most one in 2**32 choices of multipliers. Proof: a half that differs is the lower half in one of the sums, so the
difference d of its word is not a multiple of 2**32. At most one in 2**32 odd numbers r gives r d the single value
modulo 2**64 that cancels the other differences (multilinear hashing: Lemire and Kaser, arXiv 1202.4961). The
fingerprint protects against accidents and not against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from megatron_chord.weights.sums import odd_numbers

_ROW = 1 << 15
"""Number of 64-bit words in a row."""
_ROWS_AT_ONCE = {"cpu": 4, "cuda": 512}
"""Number of rows that are summed at once. On a CPU the temporary tensor (1 MiB) then fits the cache; on a GPU there are
two temporary tensors of 128 MiB."""


def checksum(tensor: Tensor) -> list[tuple[int, int]]:
    """Two signed 64-bit integers for each 256 KiB row of the tensor's bytes (row-major order). Any dtype and stride."""
    first, second = _sums(tensor.detach()).tolist()
    return list(zip(first, second, strict=True))


def fingerprint(name: str, tensor: Tensor) -> str:
    """32 hex digits over the name, dtype, shape and content of a tensor."""
    return fingerprints([(name, tensor)])[0]


def fingerprints(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The ``fingerprint`` of each tensor. All are on one device; all sums are copied to the host at once."""
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
        if rows.device.type == "cpu":  # needs no temporary; CUDA has no matrix product of integers
            torch.mv(words, multipliers, out=out[i])
        else:
            torch.sum(words * multipliers, dim=1, out=out[i])


def _words(data: Tensor) -> Tensor:
    """The bytes as int64, padded with zeros to a multiple of eight (the digest contains the shape, so also the
    length)."""
    tail = -data.numel() % 8
    if tail:
        data = torch.cat([data, data.new_zeros(tail)])
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd int64 [row]."""
    return odd_numbers(0, _ROW, device)
