"""The coordinator's plans reach every rank, and each plan is sent once to each model replica."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_chord.config import ParallelConfig
from tests.distributed.steps import start_groups
from tests.support.ranks import run_ranks

LAYOUTS = {
    "data": (ParallelConfig(), 3),
    "tensor x data": (ParallelConfig(tensor=2), 4),
    "pipeline x context": (ParallelConfig(pipeline=2, context=2), 4),
}


def receive(parallel: ParallelConfig) -> dict[str, Any]:
    groups = start_groups(parallel)
    sent: list[int] = []
    isend = dist.isend

    def counted(tensor: Any, dst: int, **kwargs: Any) -> Any:
        sent.append(dst)
        return isend(tensor, dst, **kwargs)

    dist.isend = counted
    common, own = groups.from_coordinator(
        lambda: ("all", [{"batch": d, "text": "x" * 1000 * d} for d in range(groups.data.size)])
    )
    try:
        groups.from_coordinator(lambda: 1 // 0)  # pyright: ignore[reportArgumentType]
    except ZeroDivisionError as error:
        raised = str(error)
    computed: list[int] = []

    def compute() -> int:
        computed.append(groups.rank)
        return 100 + groups.data.rank

    shared = groups.once_per_replica(compute)

    def fail() -> None:
        if groups.data.rank == groups.data.size - 1:
            raise ValueError(f"data-parallel rank {groups.data.rank}")

    try:
        groups.once_per_replica(fail)
    except ValueError as error:
        failed = str(error)
    return {
        "computed": computed,
        "shared": shared,
        "failed": failed,
        "common": common,
        "own": own,
        "data": groups.data.rank,
        "sent": sent,
        "raised": raised,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_the_entry_of_its_data_rank(name: str) -> None:
    parallel, world_size = LAYOUTS[name]
    seen = run_ranks(receive, world_size, parallel)
    for rank in seen:
        assert rank["common"] == "all"
        assert rank["own"] == {"batch": rank["data"], "text": "x" * 1000 * rank["data"]}
        assert "by zero" in rank["raised"]
    replicas = {rank["data"] for rank in seen}
    assert len(seen[0]["sent"]) == len(replicas) - 1, "the coordinator's own replica needs no message"
    assert not any(rank["sent"] for rank in seen[1:])
    firsts = [rank["computed"] for rank in seen if rank["computed"]]
    assert len(firsts) == len(replicas), "one rank of each replica computes"
    assert [rank["shared"] for rank in seen] == [100 + rank["data"] for rank in seen]
    assert {rank["failed"] for rank in seen} == {f"data-parallel rank {max(replicas)}"}
