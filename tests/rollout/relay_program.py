"""What each trainer rank runs in the test of two nodes.

Ranks 0 and 1 hold the first stage. Rank 0 exports it, rank 1 takes part in its gathers and is the publisher of the
second node. Rank 2 exports the second stage and publishes nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_chord.rollout.client import RolloutClient
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
    """The errors of the last pushes: the second stage's iterator fails half way; a server is killed half way."""
    failure_s: list[float]


def main(servers: Sequence[tuple[str, str]], to_kill: int) -> Result:
    dist.init_process_group("gloo")
    stage_group: Any = dist.new_group(FIRST_STAGE)
    group: Any = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    clients = [RolloutClient(url, key) for url, key in servers] if rank == 0 else []
    sync = WeightSync(
        clients,
        SyncSettings(transport="relay", timeout_s=240, bucket_bytes=50_000, host=HOSTS[rank]),
        exporters=EXPORTERS,
        group=group,
        device=torch.device("cpu"),
    )
    gaps, num_bytes = [], 0
    for version in (1, 2):
        num_bytes = sync.push(export(version, stage_group), version).num_bytes
        for client in clients:
            asked = requests()
            replies = client.generate(asked, version=version, deadline_s=240)
            gaps.append(largest_gap(make_model(version), asked, replies))
    failures, failure_s = [], []
    half_way = "model.layers.1.mlp.up_proj.weight"
    failing = export(3, stage_group, fail_at=half_way)
    killing = _kill_at(half_way, to_kill, export(4, stage_group))
    for version, tensors in ((3, failing), (4, killing)):
        begun = time.monotonic()
        try:
            sync.push(tensors, version)
        except SyncError as error:
            failures.append(str(error))
            failure_s.append(time.monotonic() - begun)
    sync.close()
    return Result(num_bytes, gaps, failures, failure_s)


def _kill_at(
    name: str, pid: int, tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for exported, tensor in tensors:
        if exported == name:
            os.killpg(pid, signal.SIGKILL)
        yield exported, tensor
