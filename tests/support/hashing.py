"""Python's integers in place of the 64-bit arithmetic of checksums and sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def splitmix64() -> Iterator[int]:
    """Yield the numbers of SplitMix64 for seed 0 (https://prng.di.unimi.it/splitmix64.c), each with its last bit
    set."""
    state = 0
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield (z ^ (z >> 31)) | 1


def signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >> 63 else value


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).mul(50).abs().to(dtype)
