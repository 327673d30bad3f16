"""Messages between ranks: a rank that does not take part is named by all others, also in a push of weights."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.rank_messenger import RankMessenger
from megatron_chord.rollout.sync import RankLost, SyncSettings, WeightSync
from tests.support.ranks import run_ranks


def exchange() -> tuple[list[list[int]], list[str], float]:
    """Three ranks, each with a node of its own. Rank 1 stays away from a third exchange, and from a push.

    Returns what each rank got, the errors of the others, and the seconds until both had been raised.
    """
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    dist.init_process_group("gloo")
    groups: list[Any] = [dist.new_group(backend="gloo") for _ in range(2)]
    messenger = RankMessenger(groups[0])
    # A second messenger of the same group counts on where the first one is.
    values = [messenger.all_gather(rank, 60), RankMessenger(groups[0]).all_gather(10 * rank, 60)]
    sync = WeightSync(
        [RolloutClient("http://127.0.0.1:1", "a key")] if rank == 0 else [],  # it refuses at once
        SyncSettings(transport="relay", timeout_s=0.4),
        exporters=[0, 2],
        group=groups[1],
        device=torch.device("cpu"),
    )
    begun, errors = time.monotonic(), list[str]()
    if rank != 1:
        with pytest.raises(RuntimeError) as caught:
            messenger.all_gather(rank, 1.5)
        errors.append(str(caught.value))
        with (
            mock.patch("megatron_chord.rollout.sync._ANSWER_S", 0.3),
            pytest.raises(RankLost) as failed,
        ):
            sync.push([], 1)
        errors.append(str(failed.value))
    seconds = time.monotonic() - begun
    dist.barrier()  # of the default group: rank 1 was there all the time
    return values, errors, seconds


def test_a_rank_that_does_not_come_is_named_with_its_node() -> None:
    results = run_ranks(exchange, 3)
    assert [values for values, _, _ in results] == [[[0, 1, 2], [0, 10, 20]]] * 3
    for rank in (0, 2):
        _, (gathering, push), seconds = results[rank]
        assert gathering.startswith("rank 1 on n1 did not answer within 2 s ("), gathering
        assert push.startswith("a trainer rank did not answer during a push of weights: rank "), push
        assert "rank 1 on n1" in push
        assert seconds < 20
