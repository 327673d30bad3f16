"""Groups that are replaced do not stay behind."""

from __future__ import annotations

import os

import torch

from megatron_chord.config import ParallelConfig
from megatron_chord.runtime import parallel as runtime
from tests.support.ranks import run_ranks


def threads_after_each_layout(layouts: list[ParallelConfig]) -> list[int]:
    runtime.start(layouts[0], seed=0)
    counts = []
    for layout in layouts:
        groups = runtime.build_groups(layout, device=torch.device("cpu"), seed=0)
        assert groups.gather(groups.rank) == [0, 1]
        counts.append(len(os.listdir("/proc/self/task")))
    runtime.stop()
    assert not torch.distributed.is_initialized()
    return counts


def test_the_threads_of_replaced_groups_end() -> None:
    """Megatron makes about 20 groups, and each gloo group has three threads."""
    layouts = [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(tensor=2)] * 3
    for counts in run_ranks(threads_after_each_layout, 2, layouts):
        assert counts[3:6] == counts[:3]
        assert counts[6:] == counts[:3]
