"""A test can run a function in several ranks, and a failing rank is reported. tests/README.md explains this file."""

from __future__ import annotations

import pytest
import torch

from megatron_chord.config import ParallelConfig
from tests.distributed.steps import start_groups
from tests.support.ranks import run_ranks


def sum_over_ranks(start: int) -> int:
    """It is at module level because the other processes find it by its name."""
    start_groups(ParallelConfig())
    value = torch.tensor(start + torch.distributed.get_rank())
    torch.distributed.all_reduce(value)
    return int(value)


def test_a_function_runs_in_every_rank() -> None:
    assert run_ranks(sum_over_ranks, 2, 10) == [21, 21]


def fail_in_the_second(values: list[str]) -> int:
    start_groups(ParallelConfig())
    if torch.distributed.get_rank() == 1:
        raise ValueError(f"nothing to do with {values}")
    torch.distributed.barrier()  # this would wait for ever, because the other rank does not call it
    return 0


def test_the_first_failure_is_named_first() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1 failed:.*nothing to do with \['this'\]"):
        run_ranks(fail_in_the_second, 2, ["this"], timeout_s=240)
