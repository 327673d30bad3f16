"""Brings weights to servers on several nodes, so that every byte enters a node once.

On each node with servers one rank, the publisher, receives each bucket and puts it where all servers of its node can
read it: in a buffer for CUDA IPC, or in shared memory without GPUs. Exporters and publishers are the members of the
relay. One exporter after another sends its buckets. These are the messages of one bucket:

    exporter -> members     its size, and for rank 0 the tensors' descriptions; None after the last bucket
    members -> rank 0       where the bucket will lie, or why there is no room for it
    rank 0 -> members       None, or the reason why the bucket must not be sent
    exporter -> members     broadcast of the bucket: NCCL, or gloo without GPUs
    publishers -> rank 0    the bucket has arrived
    rank 0 -> servers       announcement; each server answers when it has loaded the bucket

A publisher has two buffers. Rank 0 announces a bucket only when the servers have loaded the bucket before it, and only
then does it let the next bucket be sent. So a buffer is never overwritten while a server reads it, and a bucket is
gathered and broadcast while the servers load the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from megatron_chord.rollout.buckets import describe, flat_size, flatten
from megatron_chord.rollout.rank_messenger import RankMessenger
from megatron_chord.rollout.sender_group import SenderGroup, SenderStore, join_sender_group
from megatron_chord.rollout.transports import Bucket, FileTransport, IpcTransport, Parcel
from megatron_chord.timing import Timer

Update = Callable[[Sequence[dict]], list[Future[None]]]
"""Starts the update of one bucket on all servers, with a body for each. The futures end when it has been loaded."""
COORDINATOR = 0
_BUFFERS = 2
"""Number of a publisher's buffers, which it fills in turn."""


@dataclass(frozen=True)
class RelayPlan:
    """Which ranks and servers take part in a relay."""

    members: tuple[int, ...]
    """Exporters and publishers, in ascending order. The first is rank 0, the coordinator."""
    names: tuple[str, ...]
    """Names of the members for error messages."""
    servers: Mapping[int, tuple[int, ...]]
    """Indices of the servers on the node of each publisher, by the publisher's rank."""


def plan_relay(rank_hosts: Sequence[str], exporters: Sequence[int], server_hosts: Sequence[str]) -> RelayPlan:
    """Choose a publisher on each node with servers: an exporter if the node has one, else its first rank.

    Args:
        rank_hosts: the address of each rank's node.
        server_hosts: the address of each server's node, equal to that of the ranks beside it.
    Raises:
        ValueError: rank 0 is no exporter, or no rank runs on the node of a server.
    """
    if COORDINATOR not in exporters:
        raise ValueError(f"rank {COORDINATOR} must be an exporter; the exporters are {list(exporters)}")
    servers: dict[int, tuple[int, ...]] = {}
    for index, host in enumerate(server_hosts):
        here = [rank for rank, own in enumerate(rank_hosts) if own == host]
        if not here:
            raise ValueError(
                f"no trainer rank runs on {host}, the node of rollout server {index}; ranks run on "
                f"{', '.join(sorted(set(rank_hosts)))}. The transport relay needs ranks and servers on the same nodes; "
                "set rollout.transport to broadcast for servers on nodes of their own"
            )
        publisher = min(here, key=lambda rank: (rank not in exporters, rank))
        servers[publisher] = (*servers.get(publisher, ()), index)
    members = tuple(sorted({*exporters, *servers}))
    return RelayPlan(members, tuple(f"rank {rank} on {rank_hosts[rank]}" for rank in members), servers)


def form_relay_group(
    plan: RelayPlan,
    rank: int,
    store: SenderStore | None,
    endpoint: list | None,
    device: torch.device,
    timeout_s: float,
    given_up: Callable[[], bool],
) -> SenderGroup | None:
    """The process group of the members, on each of them; None if there is only one.

    Blocks until all have joined and are connected.

    Args:
        store: the coordinator's store; None on other members.
        endpoint: its host and port.
        given_up: on the coordinator: whether a server has failed, so that waiting for the members is of no use.
    Raises:
        TimeoutError: a member, which is named, did not join within ``timeout_s``, or they did not connect.
        RuntimeError: a member is gone, or ``given_up`` returned true.
    """
    if len(plan.members) == 1:
        return None
    if store is not None:
        return store.form_group(plan.names[1:], device, timeout_s=timeout_s, given_up=given_up)
    assert endpoint is not None
    host, port = endpoint
    place = plan.members.index(rank)
    return join_sender_group(host, port, rank=place, members=plan.names, device=device, timeout_s=timeout_s)


class _Announcer:
    """The coordinator's part of one push: announces buckets to the servers and keeps the first failure."""

    def __init__(self, plan: RelayPlan, update: Update) -> None:
        self._plan = plan
        self._update = update
        self._replies: list[Future[None]] = []
        self.failure: Exception | None = None

    def announce(self, tensors: Sequence[dict], places: Mapping[int, dict]) -> None:
        """Announce a bucket as soon as the servers have loaded the one before it. Does nothing after a failure.

        Args:
            tensors: the descriptions of its tensors.
            places: for each publisher the fields that lead its servers to the bucket.
        """
        self.settle()
        if self.failure is None:
            fields = {
                server: places[publisher]
                for publisher, servers in self._plan.servers.items()
                for server in servers
            }
            self._replies = self._update(
                [{"tensors": tensors, **fields[server]} for server in sorted(fields)]
            )

    def settle(self) -> None:
        """Wait until the servers have loaded the last bucket that was announced."""
        for reply in self._replies:
            try:
                reply.result()
            except Exception as error:
                self.failure = self.failure or error
        self._replies = []


class Relay:
    """One member's side of the relay, for all pushes of a connection."""

    def __init__(
        self,
        plan: RelayPlan,
        messenger: RankMessenger,
        group: SenderGroup | None,
        transport: FileTransport | IpcTransport | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            group: from ``form_relay_group``.
            transport: brings a publisher's buckets to the servers of its node; None on other members.
            device: the device from which buckets are sent, and on which they are received.
        """
        self._plan = plan
        self._messenger = messenger
        self._group = group
        self._transport = transport
        self._device = device
        self._others = [rank for rank in plan.members if rank != messenger.rank]
        self._parcels: list[Parcel] = []
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._announcer: _Announcer | None = None
        self._time_left: Callable[[], float] = lambda: 0.0
        self._message_s: Callable[[], float] = lambda: 0.0
        self._timer = Timer()

    def push(
        self,
        exporters: Sequence[int],
        tensors: Iterator[tuple[str, Tensor]],
        buckets: Iterator[Bucket],
        *,
        update: Update | None,
        time_left: Callable[[], float],
        message_s: Callable[[], float],
        timer: Timer,
    ) -> int:
        """Take part in one push, until the servers have loaded all buckets. Returns the bytes that this rank exported.

        Args:
            tensors: this rank's iterator. If the rank is no exporter, it yields nothing, but its collectives can be
                part of another rank's export.
            buckets: `tensors` in buckets. Used by exporters only.
            update: on the coordinator only: starts the update of one bucket on all servers, with a body for each.
            time_left: seconds until the deadline. Raises TimeoutError if it has passed.
            message_s: longest wait for a message of another member. It is longer than `time_left`, so that all members
                learn of a server that did not answer before the deadline. A message that is given up would break the
                group of all ranks.
        Raises:
            Exception: the first failure of this rank or of a server, or a PushRefused if another rank has failed.
        """
        self._announcer = None if update is None else _Announcer(self._plan, update)
        self._time_left, self._message_s, self._timer = time_left, message_s, timer
        announcer = self._announcer
        rank, num_bytes = self._messenger.rank, 0
        failures: list[Exception] = []
        try:
            with (_ended if rank in exporters else _drained)(tensors, self._device):
                for exporter in exporters:
                    try:
                        if exporter == rank:
                            num_bytes = self._export(buckets)
                        else:
                            self._pass_on(exporter)
                    except (PushRefused, _ExportFailed) as failure:
                        # Continue with the next exporter, so that each exporter is told that its buckets are refused.
                        failures.append(failure.reason if isinstance(failure, _ExportFailed) else failure)
                    if announcer is not None:
                        announcer.settle()
        finally:
            if announcer is not None and announcer.failure is not None:
                raise announcer.failure
        if failures:
            raise failures[0]
        return num_bytes

    def release(self) -> None:
        """Release the parcels. Call it after a push, when all members have ended it."""
        for parcel in self._parcels:
            parcel.release()
        self._parcels = []
        self._scratch = self._scratch.new_empty(0)

    def _export(self, buckets: Iterator[Bucket]) -> int:
        """The exporter's side of its stream. Returns the bytes of its tensors."""
        rank, num_bytes = self._messenger.rank, 0
        while True:
            try:
                with self._timer.phase("export"):
                    bucket = next(buckets, None)
                with self._timer.phase("fingerprint"):
                    infos = describe(bucket or ())
            except Exception as error:
                self._tell(dict.fromkeys(self._others))
                raise _ExportFailed(error) from error
            if bucket is None:
                self._tell(dict.fromkeys(self._others))
                return num_bytes
            size, tensors = flat_size(infos), [info.to_json() for info in infos]
            self._tell({other: [size, tensors if other == COORDINATOR else None] for other in self._others})
            self._move(rank, size, tensors, bucket)
            num_bytes += sum(tensor.nbytes for _, tensor in bucket)

    def _pass_on(self, exporter: int) -> None:
        """The side of another member in the stream of ``exporter``."""
        while (header := self._messenger.receive(exporter, self._message_s())) is not None:
            size, tensors = header
            self._move(exporter, size, tensors, None)

    def _move(self, exporter: int, size: int, tensors: Any, bucket: Bucket | None) -> None:
        """Bring one bucket of ``size`` bytes to all publishers and announce it.

        Args:
            tensors: the tensors' descriptions; needed on the coordinator.
            bucket: the tensors, on the exporter only.
        """
        memory, place = self._make_room(size)
        places = self._agree(place)
        while len(self._parcels) > _BUFFERS:
            self._parcels.pop(0).release()  # the servers have loaded it
        with self._timer.phase("copy"):
            if bucket is not None:
                flatten((tensor for _, tensor in bucket), out=memory)
            if self._group is not None:
                root = self._plan.members.index(exporter)
                self._group.broadcast(memory[:size], timeout_s=self._time_left(), root=root)
            if self._device.type == "cuda":
                # Not the whole device: another stream of this process may wait in a gather until the exporter goes on.
                torch.cuda.current_stream(self._device).synchronize()
        self._collect([], list(self._plan.servers))
        if self._announcer is not None:
            self._announcer.announce(tensors, places)

    def _make_room(self, size: int) -> tuple[Tensor, dict]:
        """Memory for a bucket, and what the coordinator must know of it: the fields for the servers, or an error."""
        try:
            if self._transport is None:
                if self._scratch.numel() < size:
                    self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device)
                return self._scratch, {}
            parcel = self._transport.make_room(size)
        except Exception as error:
            return self._scratch, {"error": f"rank {self._messenger.rank}: {type(error).__name__}: {error}"}
        self._parcels.append(parcel)
        return parcel.memory, {"fields": parcel.fields}

    def _agree(self, place: dict) -> dict[int, dict]:
        """Agree with all members that the next bucket is sent. Returns the publishers' fields on the coordinator.

        Raises PushRefused on every member if one has no room or a server has failed.
        """
        places = self._collect(place, self._plan.members)
        if self._announcer is None:
            refusal = self._messenger.receive(COORDINATOR, self._message_s())
        else:
            errors = [other["error"] for other in places.values() if "error" in other]
            if errors and self._announcer.failure is None:
                self._announcer.failure = RuntimeError("; ".join(errors))
            failure = self._announcer.failure
            refusal = None if failure is None else str(failure)
            self._tell(dict.fromkeys(self._others, refusal))
        if refusal is not None:
            raise PushRefused(f"stopped because {refusal}")
        return {rank: other.get("fields", {}) for rank, other in places.items()}

    def _collect(self, value: Any, senders: Sequence[int]) -> dict[int, Any]:
        """Bring the value of each sender to the coordinator. Returns nothing on other members."""
        rank = self._messenger.rank
        if self._announcer is None:
            if rank in senders:
                self._tell({COORDINATOR: value})
            return {}
        others = [sender for sender in senders if sender != rank]
        values = dict(zip(others, self._messenger.receive_each(others, self._message_s()), strict=True))
        return values | ({rank: value} if rank in senders else {})

    def _tell(self, values: Mapping[int, Any]) -> None:
        self._messenger.send_each(values, self._message_s())


class PushRefused(RuntimeError):
    """The push failed on another process, so the coordinator refuses the remaining buckets."""


class _ExportFailed(Exception):
    """The exporter's own iterator has failed. All members can go on with the next exporter."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextmanager
def _ended(tensors: Iterator[Any], device: torch.device) -> Iterator[None]:
    """Iterate over ``tensors`` to the end after the block, also after a failure: the other ranks of this rank's
    tensor-parallel group wait in the iterator's collectives."""
    try:
        yield
    finally:
        for _ in tensors:
            pass


@contextmanager
def _drained(tensors: Iterator[Any], device: torch.device) -> Iterator[None]:
    """Iterate over ``tensors`` in another thread during the block, and to the end, also after a failure.

    An exporter gathers a bucket while the one before it is relayed. A publisher that takes part in the gathers must do
    both at the same time. On a GPU the thread has a stream of its own, because the block's copies would otherwise wait
    for a gather that ends only when the block has received a bucket.
    """
    failures: list[Exception] = []
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the optimizer may still write the weights

    def drain() -> None:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                for name, _ in tensors:
                    raise RuntimeError(f"this rank is not an exporter but yields {name}")
        except Exception as error:
            failures.append(error)

    thread = Thread(target=drain, name="weight-export", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]
