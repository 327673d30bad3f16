from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from megatron_chord.weights.torch_dist import Box, is_tiling, write_description, write_part

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


def cut(draw: random.Random, offset: tuple[int, ...], shape: tuple[int, ...], times: int) -> Boxes:
    """Cut a box at random into boxes that together contain each of its elements once."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if times == 0 or not axes:
        return [(offset, shape)]
    axis = draw.choice(axes)
    at = draw.randint(1, shape[axis] - 1)
    sizes = (at, shape[axis] - at)
    starts = (offset[axis], offset[axis] + at)
    return [
        box
        for start, size in zip(starts, sizes, strict=True)
        for box in cut(
            draw,
            (*offset[:axis], start, *offset[axis + 1 :]),
            (*shape[:axis], size, *shape[axis + 1 :]),
            times - 1,
        )
    ]


def counted(shape: tuple[int, ...], boxes: Boxes) -> bool:
    """True if each element is in exactly one box, and no box reaches outside: element by element."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for offset, sizes in boxes:
        if any(at < 0 or at + size > whole for at, size, whole in zip(offset, sizes, shape, strict=True)):
            return False
        counts[tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))] += 1
    return bool((counts == 1).all())


def changed(draw: random.Random, boxes: Boxes) -> Boxes:
    """One box left out, twice, moved or made larger."""
    boxes = list(boxes)
    place, axis = draw.randrange(len(boxes)), draw.randrange(len(boxes[0][0]))
    offset, sizes = (list(part) for part in boxes[place])
    match draw.randrange(4):
        case 0:
            del boxes[place]
        case 1:
            boxes.append(boxes[place])
        case 2:
            offset[axis] += draw.choice((-1, 1))
            boxes[place] = tuple(offset), tuple(sizes)
        case _:
            sizes[axis] += draw.choice((-1, 1))
            boxes[place] = tuple(offset), tuple(sizes)
    return boxes


def test_only_boxes_that_contain_each_element_once_are_a_tiling() -> None:
    draw, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(400):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 4)))
        boxes = cut(draw, (0,) * len(shape), shape, draw.randint(0, 4))
        draw.shuffle(boxes)
        assert is_tiling(shape, boxes)
        for _ in range(draw.randint(1, 2)):
            boxes = changed(draw, boxes) or boxes
        if boxes:
            expected = counted(shape, boxes)
            outcomes[expected] += 1
            assert is_tiling(shape, boxes) == expected, (shape, boxes)
    assert min(outcomes.values()) >= 3


@pytest.mark.parametrize(
    ("shape", "boxes", "expected"),
    [
        ((), [((), ())], True),
        ((), [((), ()), ((), ())], False),
        ((), [], False),
        ((0, 3), [], True),
        ((0, 3), [((0, 0), (0, 3))], True),
        ((3,), [], False),
        ((2, 2), [((0, 0), (2, 2)), ((1, 0), (0, 2))], True),
        # The volumes add up to the tensor's.
        ((4,), [((0,), (2,)), ((1,), (2,))], False),
        ((2, 2), [((0, 0), (1, 2)), ((0, 0), (1, 2))], False),
    ],
)
def test_tilings_of_small_tensors(shape: tuple[int, ...], boxes: Boxes, expected: bool) -> None:
    assert is_tiling(shape, boxes) is expected


def test_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two ranks write two rows each of four rows, both from the first one on."""
    box = Box(key="weight", offset=(0, 0), shape=(2, 3), whole=(4, 3), dtype=torch.float32)
    parts = [write_part(tmp_path, {box: lambda: torch.zeros(2, 3)}, rank=rank) for rank in (0, 1)]
    with pytest.raises(RuntimeError, match=r"the 2 written parts of weight \(4, 3\) do not contain each"):
        write_description(tmp_path, parts)
