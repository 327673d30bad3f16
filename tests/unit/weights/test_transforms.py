"""Transforms put rows where Megatron-Core expects them, can be inverted bit for bit, and commute with slicing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_chord.weights.transforms import GroupedQKV, Same, Stacked, Transform


def numbered(first: int, rows: int) -> Tensor:
    """A tensor [rows, 3] whose row i holds first + i."""
    return (first + torch.arange(rows))[:, None].expand(rows, 3).contiguous()


def test_grouped_qkv_by_hand() -> None:
    # 4 query heads in 2 groups with head dim 2: group 0 holds query heads 0 and 1, key 0 and value 0.
    merged = GroupedQKV(queries_per_group=2, head_dim=2).merge(
        [numbered(0, 8), numbered(100, 4), numbered(200, 4)]
    )
    rows = [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    assert merged[:, 0].tolist() == rows
    assert torch.equal(merged, merged[:, :1].expand(-1, 3))


def test_grouped_qkv_bias_by_hand() -> None:
    query, key, value = torch.arange(6), torch.tensor([10, 11]), torch.tensor([20, 21])
    merged = GroupedQKV(queries_per_group=3, head_dim=1).merge([query, key, value])
    assert merged.tolist() == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]


def test_stacked_by_hand() -> None:
    merged = Stacked().merge([numbered(0, 2), numbered(10, 2)])
    assert merged[:, 0].tolist() == [0, 1, 10, 11]


CASES: dict[str, tuple[Transform, list[tuple[int, ...]]]] = {
    "same": (Same(), [(7, 5)]),
    "rows": (Same(axis=0), [(8, 5)]),
    "columns": (Same(axis=1), [(5, 8)]),
    "gate and up": (Stacked(), [(12, 5), (12, 5)]),
    "three stacked": (Stacked(count=3), [(8, 5)] * 3),
    "qkv": (GroupedQKV(3, 4), [(48, 5), (16, 5), (16, 5)]),
    "qkv bias": (GroupedQKV(3, 4), [(48,), (16,), (16,)]),
    "one query per group": (GroupedQKV(1, 6), [(24, 2)] * 3),
    "all queries in each of 4 groups": (GroupedQKV(8, 2), [(64, 2), (8, 2), (8, 2)]),
}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any possible bit pattern. Infinities, denormals and NaNs with payloads must survive, too."""
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    limits = torch.iinfo(bits)
    return torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_is_the_inverse_of_merge(name: str, dtype: torch.dtype) -> None:
    transform, shapes = CASES[name]
    parts = [random_bits(shape, dtype) for shape in shapes]
    merged = transform.merge(parts)
    assert merged.numel() == sum(part.numel() for part in parts)
    split = transform.split(merged)
    assert len(split) == len(parts)
    for ours, theirs in zip(split, parts, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    "name", [name for name, (transform, _) in CASES.items() if transform.axis is not None]
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_cut_merge_split_gather_is_the_identity(name: str, size: int) -> None:
    transform, shapes = CASES[name]
    axis = transform.axis
    assert axis is not None
    parts = [random_bits(shape, torch.float32) for shape in shapes]
    per_rank = [
        transform.split(transform.merge([part.chunk(size, axis)[rank] for part in parts]))
        for rank in range(size)
    ]
    for index, part in enumerate(parts):
        assert_same_bits(torch.cat([local[index] for local in per_rank], axis), part)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_of_qkv_holds_whole_groups(size: int) -> None:
    """Megatron splits the merged parameter into equal parts of rows. Merging split tensors gives the same parts."""
    transform, shapes = CASES["qkv"]
    parts = [random_bits(shape, torch.float32) for shape in shapes]
    whole = transform.merge(parts)
    for rank, expected in enumerate(whole.chunk(size)):
        assert_same_bits(transform.merge([part.chunk(size)[rank] for part in parts]), expected)


def test_parts_of_the_wrong_number_or_shape_are_refused() -> None:
    with pytest.raises(AssertionError):
        Stacked().merge([torch.zeros(2, 2)])
    with pytest.raises(RuntimeError):
        GroupedQKV(2, 4).merge([torch.zeros(16, 2), torch.zeros(6, 2), torch.zeros(8, 2)])


@pytest.mark.parametrize("name", CASES)
def test_rows_are_made_of_rows(name: str) -> None:
    """A piece between any two multiples of the unit, made from the rows that ``rows`` names, equals the parameter's
    rows."""
    transform, shapes = CASES[name]
    parts = [random_bits(shape, torch.float32) for shape in shapes]
    whole = transform.merge(parts)
    of, unit = whole.shape[0], transform.unit
    for start in range(0, of, unit):
        for stop in range(start, of + 1, unit):
            slices = transform.rows(start, stop, of)
            piece = transform.merge([part[rows] for part, rows in zip(parts, slices, strict=True)])
            assert_same_bits(piece, whole[start:stop])
