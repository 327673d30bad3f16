"""Sums over tensors, which prove that an export holds the trainer's parameters.

The sum of a matrix W is a^T W b modulo 2**64. The elements' bits are read as integers. a and b are pseudo-random odd
numbers, one for each row and each column of the *full* tensor. The sum is linear: the sums of the parts on several
ranks add up to the sum of the full tensor. So the ranks can compute it from their own parameters, and no gather is
needed (``export.expected_sums``).

A difference in one element always changes the sum, because a and b are odd and the difference is less than 2**32. Other
differences are missed with a chance of about one in 2**32: the sum is a multilinear hash (Lemire and Kaser, arXiv
1202.4961). It protects against accidents and not against an adversary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Number of elements that are summed at once. On a CPU the temporary tensor (512 KiB) fits the cache; on a GPU there
are two temporary tensors of 32 MiB."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_COLUMNS = 1 << 40
"""The first number of the columns. Rows have the numbers before it."""


class WrongExport(RuntimeError):
    """An exported tensor does not hold the trainer's parameters."""


def part_sum(part: Tensor, *, row: int = 0, column: int = 0) -> Tensor:
    """The sum of a part of a tensor: int64 [] on its device.

    Args:
        part: any shape; all axes after the first count as one. Elements of at most 4 bytes.
        row, column: position of the part's first element in the full tensor.
    """
    matrix = part.detach().flatten(1) if part.dim() > 1 else part.detach()[:, None]
    matrix = matrix.contiguous().view(_BITS[part.element_size()])
    num_rows, num_columns = matrix.shape
    rows = odd_numbers(row, num_rows, matrix.device)
    columns = odd_numbers(_COLUMNS + column, num_columns, matrix.device)
    at_once = max(1, _ELEMENTS_AT_ONCE.get(matrix.device.type, 1 << 16) // max(1, num_columns))
    total = rows.new_zeros(())
    for block, factors in zip(matrix.split(at_once), rows.split(at_once), strict=True):
        words = block.long()
        if matrix.device.type == "cpu":  # CUDA has no matrix product of integers
            total += torch.dot(torch.mv(words, columns), factors)
        else:
            total += ((words * columns).sum(1) * factors).sum()
    return total


def checked(
    buckets: Iterable[Sequence[tuple[str, Tensor]]], expected: Mapping[str, int]
) -> Iterator[Sequence[tuple[str, Tensor]]]:
    """Yield the buckets, each after a comparison of its tensors' sums with the expected ones.

    One copy to the host for each bucket.

    Raises:
        WrongExport: a tensor has another sum, or none is expected of it.
    """
    for bucket in buckets:
        sums = torch.stack([part_sum(tensor) for _, tensor in bucket]).tolist()
        wrong = [name for (name, _), found in zip(bucket, sums, strict=True) if expected.get(name) != found]
        if wrong:
            raise WrongExport(
                f"{len(wrong)} of {len(bucket)} exported tensors do not hold the trainer's parameters: "
                f"{', '.join(wrong[:8])}"
            )
        yield bucket


def checked_each(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """``checked`` for single tensors."""
    for (item,) in checked(([item] for item in tensors), expected):
        yield item


def odd_numbers(first: int, count: int, device: torch.device) -> Tensor:
    """Odd int64 [count]: numbers ``first`` to ``first + count - 1`` of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014),
    the last bit set."""
    z = torch.arange(first + 1, first + count + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, 31)) | 1


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right, which fills with zeros; torch's shift repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
