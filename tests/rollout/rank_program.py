"""What each trainer rank runs in the test of several exporters: two stages, of which the first has two tensor ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.sync import SyncError, SyncSettings, WeightSync
from tests.rollout.helpers import largest_gap, make_model, requests, weights_of

FIRST_STAGE = (0, 1)
EXPORTERS = (0, 2)


@dataclass(frozen=True)
class Result:
    num_bytes: int
    gaps: dict[str, float]
    """Rank 0 only: the largest difference from Transformers after the pushes through each transport."""
    failure: str
    """The error of the last push. In it the second stage's iterator fails half way."""
    failure_s: float


def main(url: str, key: str) -> Result:
    dist.init_process_group("gloo")
    stage_group: Any = dist.new_group(FIRST_STAGE)
    group: Any = dist.new_group(backend="gloo")
    client = RolloutClient(url, key)
    gaps, num_bytes, version = {}, 0, 2000
    for transport in ("file", "gloo", "broadcast", "relay"):
        sync = WeightSync(
            [client] if dist.get_rank() == 0 else [],
            SyncSettings(transport=transport, timeout_s=240, bucket_bytes=50_000),
            exporters=EXPORTERS,
            group=group,
            device=torch.device("cpu"),
        )
        for _ in range(2):
            version += 1
            num_bytes = sync.push(export(version, stage_group), version).num_bytes
        if dist.get_rank() == 0:
            asked = requests()
            replies = client.generate(asked, version=version, deadline_s=240)
            gaps[transport] = largest_gap(make_model(version), asked, replies)
    begun = time.monotonic()
    try:
        sync.push(export(0, stage_group, fail_at="model.layers.1.mlp.up_proj.weight"), version + 1)
    except SyncError as error:
        return Result(num_bytes, gaps, str(error), time.monotonic() - begun)
    raise AssertionError("the push did not fail")


def export(
    seed: int, stage_group: dist.ProcessGroup, fail_at: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's weights. In stage 0 two ranks gather each tensor and the leader yields it. Stage 1 is one
    rank."""
    rank = dist.get_rank()
    for name, tensor in weights_of(make_model(seed)):
        in_first_stage = "embed_tokens" in name or ".layers.0." in name
        if in_first_stage != (rank in FIRST_STAGE):
            continue
        if name == fail_at:
            raise ValueError(f"cannot export {name}")
        if in_first_stage:
            half = tensor * (torch.arange(tensor.numel()).view(tensor.shape) % 2 == rank)
            dist.all_reduce(half, group=stage_group)
            tensor = half
        if rank in EXPORTERS:
            yield name, tensor
