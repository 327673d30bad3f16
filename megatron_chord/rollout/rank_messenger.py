"""Small JSON messages between trainer ranks, each with a deadline. Torch's object collectives have no deadline.

Rank numbers are those of the given group. Without a group there is only rank 0.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.network import node_name


class RankMessenger:
    """Messages over a gloo group; the group is None in a run of one process.

    Methods raise RuntimeError if a peer is gone or does not answer before the deadline.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._arrivals = None if group is None else _Arrivals(group, self.rank, self.size)

    def all_gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Gather every rank's value, in rank order. Two collectives, and one request to the group's store.

        Raises RuntimeError with the ranks that did not call it, and their nodes, if some did not.
        """
        if self._arrivals is None:
            return [value]
        end = time.monotonic() + timeout_s
        self._arrivals.note(timeout_s)
        try:
            return self._all_gather(value, end - time.monotonic())
        except RuntimeError as error:
            missing = self._arrivals.missing()
            if not missing:
                raise
            raise RuntimeError(
                f"{', '.join(missing)} did not answer within {timeout_s:.0f} s ({error})"
            ) from error

    def _all_gather(self, value: Any, timeout_s: float) -> list[Any]:
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
        self.send_each({to: value}, timeout_s)

    def send_each(self, values: Mapping[int, Any], timeout_s: float) -> None:
        """Send each rank its value, to all ranks at the same time."""
        messages = {rank: _encode(value) for rank, value in values.items()}
        self._send_each({rank: torch.tensor([data.numel()]) for rank, data in messages.items()}, timeout_s)
        self._send_each(messages, timeout_s)

    def _send_each(self, tensors: Mapping[int, Tensor], timeout_s: float) -> None:
        works = [dist.isend(tensor, group=self._group, group_dst=rank) for rank, tensor in tensors.items()]
        for work in works:
            _wait(work, timeout_s)

    def receive(self, sender: int, timeout_s: float) -> Any:
        return self.receive_each([sender], timeout_s)[0]

    def receive_each(self, senders: Sequence[int], timeout_s: float) -> list[Any]:
        """Receive one value from each sender, all at the same time. Their order is that of the senders."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in senders]
        self._receive_into(sizes, senders, timeout_s)
        parts = [torch.zeros(int(size), dtype=torch.uint8) for size in sizes]
        self._receive_into(parts, senders, timeout_s)
        return [_decode(part) for part in parts]

    def _receive_into(self, tensors: Sequence[Tensor], senders: Sequence[int], timeout_s: float) -> None:
        works = [
            dist.irecv(tensor, group=self._group, group_src=sender)
            for tensor, sender in zip(tensors, senders, strict=True)
        ]
        for work in works:
            _wait(work, timeout_s)


class _Arrivals:
    """Notes in the group's store how often each rank has called ``all_gather``, to name those that did not.

    gloo's own error names an address at best, and often that of a rank which is itself waiting.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        own: Any = group.get_group_store()
        self._store = own.clone()  # a connection with a timeout of its own
        self._rank, self._size = rank, size
        self._own = 0
        self._store.set(f"messenger/node/{rank}", node_name())

    def note(self, timeout_s: float) -> None:
        """Note one call of this rank. Raises RuntimeError if the store does not answer in time."""
        self._store.set_timeout(datetime.timedelta(seconds=max(timeout_s, 0.001)))
        try:
            self._own = self._store.add(f"messenger/calls/{self._rank}", 1)
        except RuntimeError as error:
            raise RuntimeError(
                f"the store of the ranks, which is in rank 0's process, does not answer ({error})"
            ) from error

    def missing(self) -> list[str]:
        """Ranks that have made fewer calls than this one, with their nodes. Empty if the store does not answer."""
        try:
            return [
                f"rank {rank} on {self._node(rank)}"
                for rank in range(self._size)
                if self._store.add(f"messenger/calls/{rank}", 0) < self._own
            ]
        except RuntimeError:
            return []

    def _node(self, rank: int) -> str:
        key = f"messenger/node/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "an unknown node"


def _wait(work: dist.Work | None, timeout_s: float) -> None:
    assert work is not None
    work.wait(datetime.timedelta(seconds=timeout_s))


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
