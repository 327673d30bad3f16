from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_chord.train.optimizer_shares import Kept, Shares, within


def _elements_by_hand(
    shape: tuple[int, ...], strides: tuple[int, ...], low: int, high: int
) -> set[tuple[int, ...]]:
    return {
        at
        for at in itertools.product(*(range(size) for size in shape))
        if low <= sum(index * stride for index, stride in zip(at, strides, strict=True)) < high
    }


def test_boxes_hold_each_element_of_the_range_once():
    draw = random.Random(0)
    for _ in range(1500):
        whole = [draw.randint(1, 4) for _ in range(draw.randint(1, 4))]
        shape = tuple(draw.randint(1, size) for size in whole)
        strides = torch.empty(whole, device="meta").stride()
        low, high = sorted(draw.randint(-3, torch.Size(whole).numel() + 3) for _ in range(2))
        found = [
            tuple(start + index for start, index in zip(offset, at, strict=True))
            for offset, sizes in within(shape, strides, low, high)
            for at in itertools.product(*(range(size) for size in sizes))
        ]
        assert len(found) == len(set(found))
        assert set(found) == _elements_by_hand(shape, strides, low, high)


@pytest.mark.parametrize("cut", [1, 7, 12, 23, 24, 40])
def test_two_ranks_together_write_a_view_of_the_gathered_buffer(cut: int):
    gathered = torch.arange(60.0)
    described = torch.empty(60, device="meta")
    view, expected = (buffer[6:54].view(4, 12)[:, 3:9] for buffer in (described, gathered))
    written = torch.full((4, 6), -1.0)
    for start, end in ((0, cut), (cut, 60)):
        shares = Shares()
        shares.add(described, [Kept(start, end, gathered[start:end].clone)])
        for box in shares.boxes(view):
            places = tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))
            assert (written[places] == -1).all()
            written[places] = box.data()
    assert torch.equal(written, expected)


def test_a_copy_instead_of_a_view_is_refused():
    shares = Shares()
    shares.add(torch.empty(4, device="meta"), [])
    with pytest.raises(RuntimeError, match="is a copy, not a view"):
        list(shares.boxes(torch.empty(4, device="meta")))
