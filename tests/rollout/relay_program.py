"""What each trainer rank runs in the test of two nodes.

Ranks 0 and 1 hold the first stage. Rank 0 exports it, rank 1 takes part in its gathers and is the publisher of the
second node. Rank 2 exports the second stage and publishes nothing.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.rank_messenger import RankMessenger
from megatron_chord.rollout.sync import SyncError, SyncSettings, WeightSync
from tests.rollout.helpers import largest_gap, make_model, requests
from tests.rollout.rank_program import EXPORTERS, FIRST_STAGE, export

NODES = ("127.0.0.1", "127.0.0.2")
HOSTS = (NODES[0], NODES[1], NODES[0])
"""The node of each rank."""


@dataclass(frozen=True)
class Result:
    num_bytes: int
    gaps: list[float]
    """Rank 0 only: each server's largest difference from Transformers after each push."""
    failures: list[str]
    """The errors of the last pushes: the second stage's iterator fails half way; the second node has no room for a
    bucket; its server freezes half way."""
    failure_s: list[float]
    left: list[str]
    """The files of this rank's folder after a push."""
    answers: list[int]
    """The messages that the ranks exchanged at the end, over the same group."""


def main(servers: Sequence[tuple[str, str]], to_freeze: int, folder: Path) -> Result:
    dist.init_process_group("gloo")
    stage_group: Any = dist.new_group(FIRST_STAGE)
    group: Any = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    clients = [RolloutClient(url, key) for url, key in servers] if rank == 0 else []

    def connection(timeout_s: float) -> WeightSync:
        settings = SyncSettings(
            transport="relay", timeout_s=timeout_s, bucket_bytes=50_000, host=HOSTS[rank], folder=folder
        )
        return WeightSync(clients, settings, exporters=EXPORTERS, group=group, device=torch.device("cpu"))

    sync, hasty = connection(240), connection(20)
    gaps, num_bytes = [], 0
    for version in (1, 2):
        num_bytes = sync.push(export(version, stage_group), version).num_bytes
        for client in clients:
            asked = requests()
            replies = client.generate(asked, version=version, deadline_s=240)
            gaps.append(largest_gap(make_model(version), asked, replies))
    left = [str(path) for path in folder.glob("*/*")]
    half_way = "model.layers.1.mlp.up_proj.weight"
    failures, failure_s = [], []

    def fail(sync: WeightSync, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        begun = time.monotonic()
        try:
            sync.push(tensors, 9)
        except SyncError as error:
            failures.append(str(error))
            failure_s.append(time.monotonic() - begun)

    fail(sync, export(3, stage_group, fail_at=half_way))
    with mock.patch("os.posix_fallocate", _no_room if rank == 1 else os.posix_fallocate):
        fail(sync, export(4, stage_group))
    # Of the second stage's four buckets at least one comes after the one that the server no longer answers.
    fail(hasty, _freeze_at(half_way, to_freeze, export(5, stage_group)))
    answers = RankMessenger(group).all_gather(rank, 60)
    sync.close()
    hasty.close()
    return Result(num_bytes, gaps, failures, failure_s, left, answers)


def _no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _freeze_at(
    name: str, pid: int, tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for exported, tensor in tensors:
        if exported == name:
            os.killpg(pid, signal.SIGSTOP)
        yield exported, tensor
