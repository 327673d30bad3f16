"""Small JSON messages between trainer ranks, each with a deadline. Torch's object collectives have no deadline.

Rank numbers are those of the given group. Without a group there is only rank 0.
"""

from __future__ import annotations

import datetime
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankMessenger:
    """Messages over a gloo group; the group is None in a run of one process.

    Methods raise RuntimeError if a peer is gone or does not answer before the deadline.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def all_gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Gather every rank's value, in rank order. Two collectives."""
        if self._group is None:
            return [value]
        data = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        _wait(
            dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group, async_op=True), timeout_s
        )
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        _wait(dist.all_gather(parts, padded, group=self._group, async_op=True), timeout_s)
        return [_decode(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def send(self, value: Any, to: int, timeout_s: float) -> None:
        data = _encode(value)
        _wait(dist.isend(torch.tensor([data.numel()]), group=self._group, group_dst=to), timeout_s)
        _wait(dist.isend(data, group=self._group, group_dst=to), timeout_s)

    def receive(self, sender: int, timeout_s: float) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        _wait(dist.irecv(size, group=self._group, group_src=sender), timeout_s)
        data = torch.zeros(int(size), dtype=torch.uint8)
        _wait(dist.irecv(data, group=self._group, group_src=sender), timeout_s)
        return _decode(data)


def _wait(work: dist.Work | None, timeout_s: float) -> None:
    assert work is not None
    work.wait(datetime.timedelta(seconds=timeout_s))


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
