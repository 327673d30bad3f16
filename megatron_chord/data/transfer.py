"""Copies several host arrays to a device in one copy that does not block the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Alignment of each array in bytes: enough for every dtype and every vector load of a kernel."""


def move_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on ``device``, which are views of one buffer.

    A copy from pageable memory to CUDA first waits for the earlier work of its stream; a copy from pinned memory does
    not. The pinned buffer may be released at once, because torch's allocator keeps it until the copy is done. On a CPU
    there is one copy within memory.
    """
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    starts = list(itertools.accumulate(sizes, initial=0))
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for start, array in zip(starts, arrays, strict=False):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
