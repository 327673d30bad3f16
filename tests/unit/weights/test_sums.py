"""A tensor's sum equals the plain definition and the sum of its parts' sums, and changes with every stale element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_chord.weights import sums as module
from megatron_chord.weights.sums import WrongExport, checked, part_sum
from tests.support.hashing import random_tensor, signed, splitmix64

_COLUMN_NUMBERS = 1 << 40


def split_mix(index: int) -> int:
    """Number ``index`` of SplitMix64 for seed 0, its last bit set (https://prng.di.unimi.it/splitmix64.c)."""
    z = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) | 1


def plain_sum(tensor: Tensor) -> int:
    """The sum, element by element, with Python's integers."""
    bits = tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    rows = bits.reshape(len(bits), bits[:1].numel()).tolist()
    return signed(
        sum(
            split_mix(i) * split_mix(_COLUMN_NUMBERS + j) * word
            for i, row in enumerate(rows)
            for j, word in enumerate(row)
        )
    )


def test_the_numbers_are_those_published() -> None:
    published = splitmix64()
    assert [split_mix(index) for index in range(50)] == [next(published) for _ in range(50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (5, 3), (4, 3, 2)])
def test_equals_the_plain_definition(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_tensor(dtype, *shape) - 20
    assert part_sum(tensor).item() == plain_sum(tensor)
    monkeypatch.setitem(module._ELEMENTS_AT_ONCE, "cpu", 6)  # two rows of three
    assert part_sum(tensor).item() == plain_sum(tensor)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_sums_of_parts_add_up(axis: int) -> None:
    tensor = random_tensor(torch.bfloat16, 12, 8)
    start, total = 0, 0
    for part in tensor.split([3, 5, tensor.shape[axis] - 8], dim=axis):
        total += int(part_sum(part, **{("row", "column")[axis]: start}))
        start += part.shape[axis]
    assert signed(total) == plain_sum(tensor)


def test_every_flipped_bit_changes_it() -> None:
    tensor = random_tensor(torch.bfloat16, 6, 5)
    right, bits = part_sum(tensor).item(), tensor.view(torch.int16)
    for i in range(6):
        for j in range(5):
            for bit in range(16):
                flip = -(1 << 15) if bit == 15 else 1 << bit
                bits[i, j] ^= flip
                assert part_sum(tensor).item() != right
                bits[i, j] ^= flip
    assert part_sum(tensor).item() == right


def test_exchanged_rows_columns_and_opposite_changes_are_noticed() -> None:
    tensor = random_tensor(torch.float32, 6, 5)
    right = part_sum(tensor).item()
    assert part_sum(tensor.roll(1, 0)).item() != right
    assert part_sum(tensor.roll(1, 1)).item() != right
    bits = tensor.clone().view(torch.int32)
    bits[0, 0] += 1
    bits[5, 4] -= 1
    assert part_sum(bits.view(torch.float32)).item() != right


def test_a_wrong_tensor_is_named() -> None:
    tensors = {name: random_tensor(torch.bfloat16, 4, 4) + i for i, name in enumerate("abc")}
    expected = {name: plain_sum(tensor) for name, tensor in tensors.items()}
    buckets = [[("a", tensors["a"])], [("b", tensors["b"]), ("c", tensors["c"])]]
    assert list(checked(buckets, expected)) == buckets
    one_bit_off = expected | {"c": plain_sum(tensors["c"] + 0.5)}
    with pytest.raises(WrongExport, match=r"1 of 2 exported tensors .* parameters: c$"):
        list(checked(buckets, one_bit_off))
    del expected["b"]
    with pytest.raises(WrongExport, match=r"1 of 2 exported tensors .* parameters: b$"):
        list(checked(buckets, expected))
