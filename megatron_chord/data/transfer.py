"""Host arrays to a device, many in one copy that does not hold up the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes that each array begins at a multiple of: enough for every dtype and every vector load of a kernel."""


def move_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on ``device``, which are views of one buffer.

    A copy from pageable memory to CUDA first waits for what its stream has been given to do; one from pinned memory
    does not. The pinned buffer may be dropped at once: torch's allocator keeps it until the copy is done.
    On a CPU there is one copy within memory.
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
