"""Arrays that are copied through one buffer are unchanged."""

from __future__ import annotations

import numpy as np
import torch

from megatron_chord.data.transfer import move_together


def test_every_dtype_and_shape_arrives() -> None:
    arrays = [
        np.arange(5, dtype=np.int64) - 2,
        np.array([[1.5, -2.5, 3.0]], np.float32),
        np.zeros(0, np.float32),
        np.array([7, 8, 9], np.int32),
        np.arange(12, dtype=np.int64)[::3],  # not contiguous
        np.array([np.pi]),
    ]
    moved = move_together(arrays, torch.device("cpu"))
    for tensor, array in zip(moved, arrays, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert tensor.shape == array.shape
        assert tensor.tolist() == array.tolist()
        assert tensor.is_contiguous()
        assert len(array) == 0 or tensor.data_ptr() % 64 == moved[0].data_ptr() % 64
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1


def test_nothing_to_move() -> None:
    assert move_together([], torch.device("cpu")) == []
