"""Measure the time of a function: with CUDA events on a GPU, elsewhere with the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the median of ``repeats`` calls after two that warm up. Without CUDA, time one call after one that warms
    up."""
    if not torch.cuda.is_available():
        function()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    for _ in range(2):
        function()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)
