"""The checksum changes with every kind of damage that a transfer can do, and does not depend on how a tensor is
stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_chord.rollout import checksum as module
from megatron_chord.rollout.checksum import checksum, fingerprint, fingerprints
from tests.support.hashing import random_tensor, signed, splitmix64

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def plain_checksum(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Compute the checksum word by word with Python's integers."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    data += b"\0" * (-len(data) % 8)
    rows = [data[start : start + 8 * module._ROW] for start in range(0, len(data), 8 * module._ROW)]
    return [(weighted(row), weighted(row[4:] + row[:4])) for row in rows]


def weighted(row: bytes) -> int:
    words = np.frombuffer(row, dtype=np.int64).tolist()
    return signed(sum(word * factor for word, factor in zip(words, splitmix64(), strict=False)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 5), (64, 33)])
def test_equals_the_plain_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, *shape)
    assert checksum(tensor) == plain_checksum(tensor)


def test_equals_the_plain_definition_over_several_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROW", 64)
    module._multipliers.cache_clear()
    tensor = random_tensor(torch.float32, 1001, 7)
    assert len(checksum(tensor)) == 55
    assert checksum(tensor) == plain_checksum(tensor)
    by_one = checksum(tensor)
    monkeypatch.setitem(module._ROWS_AT_ONCE, "cpu", 13)
    assert checksum(tensor) == by_one
    module._multipliers.cache_clear()


def test_multipliers_are_those_published() -> None:
    """SplitMix64's first number for seed 0 is odd, so it is used as published."""
    assert module._multipliers(torch.device("cpu"))[0].item() == signed(0xE220A8397B1DCDAF)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_of_the_content_not_of_the_storage(dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, 9, 11)
    for view in (tensor.t(), tensor[1:, 3], tensor[2:5], tensor.reshape(-1)[1:]):
        assert checksum(view) == checksum(view.clone(memory_format=torch.contiguous_format))
    named = [("a", tensor), ("b", tensor[1:]), ("c", tensor[:0])]
    assert fingerprints(named) == [fingerprint(*item) for item in named]
    assert fingerprints([]) == []


def test_every_flipped_bit_changes_it() -> None:
    tensor = random_tensor(torch.bfloat16, 5, 7)
    original = checksum(tensor)
    data = tensor.view(torch.uint8)
    for byte in range(data.numel()):
        for bit in range(8):
            data.view(-1)[byte] ^= 1 << bit
            assert checksum(tensor) != original
            data.view(-1)[byte] ^= 1 << bit
    assert checksum(tensor) == original


@pytest.mark.parametrize(("first", "second"), [(0, 2), (1, 17), (3, 64), (5, 127)])
def test_two_flipped_signs_do_not_cancel(first: int, second: int) -> None:
    """Two exchanged values of opposite sign do not cancel either. A single weighted sum would miss them."""
    tensor = torch.ones(256)
    damaged = tensor.clone()
    damaged[[2 * first + 1, 2 * second + 1]] *= -1
    assert checksum(damaged) != checksum(tensor)
    tensor[2 * first + 1] = -1
    damaged = tensor.clone()
    damaged[[2 * first + 1, 2 * second + 1]] = damaged[[2 * second + 1, 2 * first + 1]]
    assert checksum(damaged) != checksum(tensor)


def test_all_signs_flipped_or_two_rows_exchanged() -> None:
    tensor = random_tensor(torch.float32, 4, 2 * module._ROW)
    assert len(checksum(tensor)) == 4
    for damaged in (-tensor, tensor[[1, 0, 2, 3]], tensor[[0, 0, 2, 3]], tensor.roll(1)):
        assert checksum(damaged) != checksum(tensor)


def test_order_and_extent_matter() -> None:
    tensor = random_tensor(torch.float32, 8, 6)
    damaged = [
        tensor.flip(0),
        tensor[torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])],
        tensor.roll(1),
        tensor.t(),
        torch.cat([tensor[:-1], torch.zeros(1, 6)]),
        torch.cat([tensor[:-1], tensor[:1]]),
    ]
    assert len({*map(tuple, map(checksum, [tensor, *damaged]))}) == len(damaged) + 1


def test_fingerprint_holds_name_dtype_and_shape() -> None:
    zeros = torch.zeros(4, 6)
    others = [("b", zeros), ("a", zeros.view(6, 4)), ("a", torch.zeros(8, 6, dtype=torch.bfloat16))]
    assert fingerprint("a", zeros) == fingerprint("a", zeros.clone())
    assert fingerprint("a", zeros) not in [fingerprint(name, tensor) for name, tensor in others]
    assert fingerprint("a", torch.zeros(1)) != fingerprint("a", torch.zeros(2))
