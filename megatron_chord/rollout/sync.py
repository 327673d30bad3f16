"""Pushes new weights from the trainer to its rollout servers, and verifies that they arrived.

Every rank calls ``WeightSync.push``. The exporters are the ranks whose iterator yields tensors, one for each pipeline
stage. They send bucket by bucket, one exporter after another. Rank 0, the coordinator, announces each bucket to the
servers:

    rank 0      pause -> start ->  update (bucket) ... update (bucket)  -> finish(version) -> check -> resume
    exporters                      publish, transmit   publish, transmit
    others                         take part in the iterator's collectives

With ``relay`` one rank of each node passes the buckets on to the servers of its node (``rollout.relay``).

A server verifies the fingerprint of each tensor that it receives and, at the end, that no parameter is missing. If
anything fails, every rank raises the same SyncError and the servers stay paused. Their weights are then a mixture of
old and new ones, so the caller must restart the servers and call ``reconnect``, or push again. The first push also ends
an update that a killed trainer has left open in a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.network import loopback, resolve
from megatron_chord.precision import Quantization
from megatron_chord.processes import SHARED_MEMORY, PrivateFolder
from megatron_chord.rollout.buckets import describe, in_buckets
from megatron_chord.rollout.client import PauseMode, RolloutClient
from megatron_chord.rollout.rank_messenger import RankMessenger
from megatron_chord.rollout.relay import (
    COORDINATOR,
    PushRefused,
    Relay,
    RelayPlan,
    form_relay_group,
    plan_relay,
)
from megatron_chord.rollout.sender_group import SenderGroup, SenderStore
from megatron_chord.rollout.transports import (
    BroadcastTransport,
    Bucket,
    FileTransport,
    IpcTransport,
    Parcel,
    Transport,
)
from megatron_chord.timing import Timer
from megatron_chord.weights.sums import checked

TransportName = Literal["file", "gloo", "broadcast", "ipc", "relay"]
BUCKET_BYTES: dict[TransportName, int] = {
    "file": 64 << 20,
    "gloo": 64 << 20,
    "broadcast": 256 << 20,
    "ipc": 256 << 20,
    "relay": 256 << 20,
}
"""Maximum size of a bucket by transport. The transports through main memory are slow compared with the request that
announces a bucket; with small buckets the overlap begins earlier."""
_ANSWER_S = 10.0
"""Seconds added to a deadline, so that ranks can still exchange their errors after it has passed."""


class SyncError(RuntimeError):
    """A push failed; every rank raises it. The servers must be restarted before they sample again."""


class RankLost(RuntimeError):
    """A trainer rank took no part in a push; all others raise it. The ranks cannot communicate any more."""


@dataclass(frozen=True)
class SyncReport:
    """Size and duration of a push."""

    version: int
    num_bytes: int
    """Bytes that all exporters sent together."""
    seconds: float
    phases: dict[str, float]
    """Seconds of each phase on this rank: connect; start (pause the servers and begin the update); export, fingerprint
    and copy of this rank's buckets; wait (until the servers have received them, and for other ranks); finish (including
    the check of the version and the resume)."""


@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """Settings of a push. They are equal on all ranks, except `host`."""

    transport: TransportName
    timeout_s: float
    """Time limit of one push."""
    folder: Path = SHARED_MEMORY
    """``file``: rank 0 makes a private folder here. It must be in memory that all exporters and servers share.
    ``relay`` without GPUs: one rank of each node makes one. It must be in memory that this rank and the servers of its
    node share."""
    host: str = field(default_factory=loopback)
    """``broadcast``, ``gloo`` and ``relay``: address of this rank that servers and other ranks can reach. For ``relay``
    it is also the address in the URLs of the servers on the same node."""
    bucket_bytes: int | None = None
    """Maximum size of a bucket that has more than one tensor. None: ``BUCKET_BYTES``."""
    pause_mode: PauseMode = "wait"
    """What happens to running requests when a push begins (``RolloutClient.pause``)."""
    quantization: Quantization | None = None
    """The quantisation with which the servers must have been started. A server with another one is refused."""


class _Place(TypedDict):
    """What a rank offers to servers and other ranks."""

    endpoint: list | None
    """Host and port of the store through which a process group is formed."""
    folder: str | None
    """The private folder for buckets in shared memory."""


class _Servers(TypedDict):
    """What ranks need to know of the servers."""

    urls: list[str]
    hosts: list[str]
    """Numeric address of each server."""
    workers: list[int]
    """Number of workers of each server."""


class WeightSync:
    """Pushes weights to the servers. The first push, and the first after ``reconnect``, also sets up the transport."""

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        settings: SyncSettings,
        *,
        exporters: Sequence[int],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            clients: one for each server on rank 0; empty on the other ranks.
            exporters: ranks (of `group`) whose iterator yields tensors.
            group: gloo group of all trainer ranks, or None in a run of one process.
            device: device of this rank's tensors. With cuda ``broadcast`` uses NCCL, and the servers must be on GPUs,
                too.
        """
        self._clients = tuple(clients)
        self._settings = settings
        self._exporters = tuple(exporters)
        self._messenger = RankMessenger(group)
        self._device = device
        on_cpu = settings.transport == "relay" and device.type != "cuda"
        self._bucket_bytes = settings.bucket_bytes or BUCKET_BYTES["file" if on_cpu else settings.transport]
        self._private: PrivateFolder | None = None
        """The private folder, on the rank that made it."""
        self._staging: list[Tensor | None] = [None, None]
        """The buffers of ``IpcTransport``, which outlive a connection."""
        self._transport: Transport | None = None
        self._relay: Relay | None = None
        self._group: SenderGroup | None = None
        """The process group with servers or relay members, if this rank has one. It is closed here."""
        self._connected = False
        self._deadline = 0.0
        self._timer = Timer()
        self._pool: ThreadPoolExecutor | None = None
        if self._is_coordinator:
            if not clients:
                raise ValueError("the coordinator, rank 0, needs at least one rollout client")
            self._pool = ThreadPoolExecutor(len(clients), thread_name_prefix="weight-sync")

    @property
    def _is_coordinator(self) -> bool:
        return self._messenger.rank == COORDINATOR

    def reconnect(self, clients: Sequence[RolloutClient]) -> None:
        """Use new servers from the next push on. `clients` is needed on rank 0 only."""
        assert self._is_coordinator
        assert len(clients) == len(self._clients)
        self._clients = tuple(clients)
        self._connected = False

    def close(self) -> None:
        """Remove the private folder, and drop the process groups and the staging buffers."""
        self._disconnect()
        self._staging = [None, None]
        if self._pool is not None:
            self._pool.shutdown(wait=False)
        if self._private is not None:
            self._private.close()

    def _disconnect(self) -> None:
        if self._relay is not None:
            self._relay.release()
        if self._group is not None:
            self._group.close()
        self._transport, self._relay, self._group, self._connected = None, None, None, False

    def push(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: int,
        *,
        expected: Mapping[str, int] | None = None,
    ) -> SyncReport:
        """Replace the servers' weights by `named_tensors` and their version by `version`.

        Args:
            named_tensors: every full Hugging Face tensor with its name. Exactly one exporter yields each tensor; other
                ranks yield nothing. Every rank iterates to the end, also after a failure, unless the connection could
                not be set up. The iterator must not need collectives between exporters. A tensor must keep its
                content until the iterator has yielded the tensors of a further bucket.
            expected: on an exporter the sum of each tensor that it yields (``weights.sums.part_sum``). A tensor with
                another sum, such as a stale one, fails the push. None: the tensors are not compared.
        Raises:
            SyncError: on every rank.
            RankLost: a rank died or did not come before the deadline. On all others, with its number and its node.
            ValueError: on every rank: ``relay``, but servers run on nodes without ranks.
        """
        start, timer = time.monotonic(), Timer()
        self._timer = timer
        self._deadline = start + self._settings.timeout_s
        try:
            with timer.phase("connect"):
                self._connect()
            with timer.phase("start"):
                self._together(self._open_update, rank=COORDINATOR)
            num_bytes = sum(self._together(lambda: self._stream(named_tensors, expected)))
            with timer.phase("finish"):
                self._together(lambda: self._close_update(version), rank=COORDINATOR)
            if self._relay is not None:
                self._relay.release()
        except BaseException:
            self._disconnect()
            raise
        seconds = time.monotonic() - start
        timer.seconds["wait"] = seconds - sum(timer.seconds.values())
        return SyncReport(version, num_bytes, seconds, timer.seconds)

    def _together(self, action: Callable[[], Any], *, rank: int | None = None) -> list[Any]:
        """Run `action` on every rank, or only on `rank`, and gather the results. If one fails, all raise SyncError.

        Raises RankLost if a rank does not take part.
        """
        result, failure = None, None
        try:
            if rank is None or rank == self._messenger.rank:
                result = action()
        except Exception as error:
            failure = error
        outcome = {"result": result, "error": failure and f"{type(failure).__name__}: {failure}"}
        try:
            outcomes = self._messenger.all_gather(outcome, max(self._remaining(), 0.0) + 2 * _ANSWER_S)
        except RuntimeError as error:
            raise RankLost(f"a trainer rank did not answer during a push of weights: {error}") from error
        errors = [f"rank {i}: {other['error']}" for i, other in enumerate(outcomes) if other["error"]]
        if errors:
            raise SyncError("; ".join(errors)) from failure
        return [outcome["result"] for outcome in outcomes]

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def _time_left(self) -> float:
        """Seconds until the deadline. Raises TimeoutError if it has passed."""
        remaining = self._remaining()
        if remaining <= 0:
            raise TimeoutError(f"the push of weights took more than {self._settings.timeout_s:.0f} s")
        return remaining

    def _message_s(self) -> float:
        """Longest wait for a message of another rank.

        This is longer than the wait for a server, so a missing answer is noticed first and reported to all ranks. If a
        gloo message times out, gloo closes its connections, and the group cannot be used again.
        """
        return max(self._remaining(), 0.0) + _ANSWER_S

    def _connect(self) -> None:
        plan = self._together(self._plan, rank=COORDINATOR)[COORDINATOR]
        if plan is None:
            return
        relay: RelayPlan | None = None
        if self._settings.transport == "relay":
            hosts = self._together(lambda: self._settings.host)
            relay = plan_relay(hosts, self._exporters, plan["hosts"])
        store: SenderStore | None = None

        def prepare() -> _Place:
            nonlocal store
            folder = self._make_folder(relay)
            if not self._listens(relay):
                return {"endpoint": None, "folder": folder}
            store = SenderStore(self._settings.host, self._settings.timeout_s)
            return {"endpoint": [store.host, store.port], "folder": folder}

        places: list[_Place] = self._together(prepare)
        self._together(lambda: self._connect_servers(store, plan, places, relay))

    def _plan(self) -> _Servers | None:
        """What ranks need to know of the servers to connect. None if the connection exists."""
        if self._connected:
            return None
        self._call_servers(lambda client: client.end_open_update(timeout_s=self._time_left()))
        return {
            "urls": [client.url for client in self._clients],
            "hosts": [_address_of(client.url) for client in self._clients],
            "workers": [client.num_workers(timeout_s=self._time_left()) for client in self._clients],
        }

    def _make_folder(self, relay: RelayPlan | None) -> str | None:
        """Make this rank's private folder, if it needs one and has none. Returns its path."""
        rank = self._messenger.rank
        if relay is not None:
            needs_one = rank in relay.servers and self._device.type != "cuda"
        else:
            needs_one = rank == COORDINATOR and self._settings.transport == "file"
        if needs_one and self._private is None:
            self._private = PrivateFolder(self._settings.folder)
        return str(self._private.path) if needs_one and self._private is not None else None

    def _listens(self, relay: RelayPlan | None) -> bool:
        """True if other processes join a process group through this rank."""
        if relay is not None:
            return self._is_coordinator and len(relay.members) > 1
        return self._settings.transport in ("broadcast", "gloo") and self._messenger.rank in self._exporters

    def _connect_servers(
        self,
        store: SenderStore | None,
        servers: _Servers,
        places: Sequence[_Place],
        relay: RelayPlan | None,
    ) -> None:
        """Tell the servers where weights come from, while this rank waits for those that join its process group."""
        self._disconnect()  # from servers that were replaced
        replies: list[Future[None]] = []
        workers = servers["workers"]
        if self._is_coordinator:
            replies = self._submit_each(
                lambda client, body: client.init_weight_transfer(body, timeout_s=self._time_left()),
                self._init_bodies(workers, places, relay),
            )
        try:
            if relay is not None:
                self._relay = self._make_relay(relay, store, workers, places, replies)
            elif self._messenger.rank in self._exporters:
                self._transport = self._make_transport(store, servers, places, replies)
        except Exception:
            _raise_first(replies)  # a server's own error says more
            raise
        for future in replies:
            future.result()
        self._connected = True

    def _init_bodies(
        self, workers: Sequence[int], places: Sequence[_Place], relay: RelayPlan | None
    ) -> list[dict]:
        """The body of the request that initialises the transfer, for each server."""
        settings = self._settings
        local: str = settings.transport
        if relay is not None:
            local = "ipc" if self._device.type == "cuda" else "file"
        endpoints = [place["endpoint"] for place in places if place["endpoint"] is not None]
        bodies: dict[int, dict] = {}
        senders = {COORDINATOR: range(len(workers))} if relay is None else relay.servers
        for rank, servers in senders.items():  # workers are numbered among those with the same sender
            for position, server in enumerate(servers):
                bodies[server] = {
                    "transport": local,
                    "timeout_s": settings.timeout_s,
                    "folder": places[rank]["folder"],
                    "endpoints": endpoints if relay is None else [],
                    "num_workers": sum(workers[other] for other in servers),
                    "first_worker": sum(workers[other] for other in servers[:position]),
                    "quantization": settings.quantization,
                }
        return [bodies[server] for server in sorted(bodies)]

    def _make_transport(
        self,
        store: SenderStore | None,
        servers: _Servers,
        places: Sequence[_Place],
        replies: Sequence[Future[None]],
    ) -> Transport:
        sender, num_workers = self._exporters.index(self._messenger.rank), sum(servers["workers"])
        if self._settings.transport == "file":
            folder = places[COORDINATOR]["folder"]
            assert folder is not None
            return FileTransport(Path(folder), sender)
        if self._settings.transport == "ipc":
            return IpcTransport(sender, num_workers, self._device, self._staging)
        assert store is not None
        device = torch.device("cpu") if self._settings.transport == "gloo" else self._device
        names = [
            f"worker {worker} of {url}"
            for url, count in zip(servers["urls"], servers["workers"], strict=True)
            for worker in range(count)
        ]
        self._group = store.form_group(
            names, device, timeout_s=self._time_left(), given_up=lambda: _has_failed(replies)
        )
        return BroadcastTransport(self._group, sender, device, self._settings.timeout_s)

    def _make_relay(
        self,
        plan: RelayPlan,
        store: SenderStore | None,
        workers: Sequence[int],
        places: Sequence[_Place],
        replies: Sequence[Future[None]],
    ) -> Relay | None:
        """This rank's side of the relay; None if the rank is no member."""
        rank, transport = self._messenger.rank, None
        if rank not in plan.members:
            return None
        if rank in plan.servers:
            folder = places[rank]["folder"]
            num_workers = sum(workers[server] for server in plan.servers[rank])
            transport = (
                IpcTransport(0, num_workers, self._device, self._staging)
                if folder is None
                else FileTransport(Path(folder), 0)
            )
        self._group = form_relay_group(
            plan,
            rank,
            store,
            places[COORDINATOR]["endpoint"],
            self._device,
            self._time_left(),
            lambda: _has_failed(replies),
        )
        return Relay(plan, self._messenger, self._group, transport, self._device)

    def _open_update(self) -> None:
        self._call_servers(
            lambda client: client.pause(mode=self._settings.pause_mode, timeout_s=self._time_left())
        )
        self._call_servers(lambda client: client.start_weight_update(timeout_s=self._time_left()))

    def _close_update(self, version: int) -> None:
        self._call_servers(lambda client: client.finish_weight_update(version, timeout_s=self._time_left()))
        for client in self._clients:
            served = client.weight_version(timeout_s=self._time_left())
            if served != version:
                raise RuntimeError(f"{client.url} serves weight version {served} after a push of {version}")
        self._call_servers(lambda client: client.resume(timeout_s=self._time_left()))

    def _stream(self, named_tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, int] | None) -> int:
        """Send this rank's tensors; on the coordinator also serve the other exporters. Returns bytes sent by this
        rank."""
        tensors = iter(named_tensors)
        buckets: Iterator[Bucket] = in_buckets(tensors, self._bucket_bytes)
        if expected is not None:
            buckets = checked(buckets, expected)
        if self._relay is not None:
            return self._relay.push(
                self._exporters,
                tensors,
                buckets,
                update=self._update_each if self._is_coordinator else None,
                time_left=self._time_left,
                message_s=self._message_s,
                timer=self._timer,
            )
        failure: Exception | None = None
        num_bytes = 0
        try:
            num_bytes = self._send_all(tensors, buckets)
        except Exception as error:
            failure = error
            # The other ranks of this one's tensor-parallel group wait in the iterator's collectives.
            for _ in tensors:
                pass
        if self._is_coordinator:
            refusal = None if failure is None else f"rank {COORDINATOR} failed"
            for exporter in self._exporters:
                if exporter != COORDINATOR:
                    refusal = self._serve(exporter, refusal)
        if failure is not None:
            raise failure
        return num_bytes

    def _send_all(self, tensors: Iterator[tuple[str, Tensor]], buckets: Iterator[Bucket]) -> int:
        """Send the buckets, which are made of ``tensors``."""
        if self._transport is None:
            for name, _ in tensors:
                raise RuntimeError(f"rank {self._messenger.rank} is not an exporter but yields {name}")
            return 0
        send = self._send_own if self._is_coordinator else self._send_by_coordinator
        num_bytes = 0
        parcels: list[Parcel] = []
        arrived: Callable[[], None] | None = None
        try:
            for bucket in self._timer.each("export", buckets):
                # This bucket is gathered, fingerprinted and copied while the servers receive the previous one.
                with self._timer.phase("fingerprint"):
                    infos = describe(bucket)
                with self._timer.phase("copy"):
                    parcels.append(self._transport.publish(bucket, infos))
                if arrived is not None:
                    before, arrived = arrived, None
                    before()
                    parcels.pop(0).release()
                arrived = send(
                    {"tensors": [info.to_json() for info in infos], **parcels[-1].fields}, parcels[-1]
                )
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
            if arrived is not None:
                before, arrived = arrived, None
                before()
        except PushRefused:
            raise
        except Exception:
            if arrived is not None:
                arrived()  # otherwise its reply would be mistaken for that of the next bucket
            self._send_end()
            raise
        finally:
            for parcel in parcels:
                parcel.release()
        self._send_end()
        return num_bytes

    def _send_end(self) -> None:
        if not self._is_coordinator:
            self._messenger.send(None, COORDINATOR, self._message_s())

    def _send_own(self, update_info: dict, parcel: Parcel) -> Callable[[], None]:
        """Start sending the parcel. The returned function waits until the servers have received it."""
        replies = self._announce(update_info)

        def arrived() -> None:
            for future in replies:
                future.result()

        try:
            parcel.transmit(lambda: _has_failed(replies))
        except Exception:
            _raise_first(replies)  # a server's own error says more than "the receivers gave up"
            raise
        return arrived

    def _send_by_coordinator(self, update_info: dict, parcel: Parcel) -> Callable[[], None]:
        """The exporter's side of ``_serve`` for one bucket. Returns a waiting function, like ``_send_own``."""
        self._messenger.send(update_info, COORDINATOR, self._message_s())
        self._await_coordinator()  # the coordinator has announced the bucket to the servers
        parcel.transmit(lambda: False)
        return self._await_coordinator  # the coordinator confirms that the servers have received it

    def _await_coordinator(self) -> None:
        refusal = self._messenger.receive(COORDINATOR, self._message_s())
        if refusal is not None:
            raise PushRefused(f"stopped because {refusal}")

    def _serve(self, exporter: int, refusal: str | None) -> str | None:
        """The coordinator's side: announce each of an exporter's buckets to the servers.

        Returns the reason why the push failed, or None.
        """
        while True:
            update_info = self._messenger.receive(exporter, self._message_s())
            if update_info is None:
                return refusal
            replies = [] if refusal is not None else self._announce(update_info)
            self._messenger.send(refusal, exporter, self._message_s())
            if refusal is not None:
                return refusal
            try:
                for future in replies:
                    future.result()
            except Exception as error:
                refusal = str(error)
            self._messenger.send(refusal, exporter, self._message_s())
            if refusal is not None:
                return refusal

    def _announce(self, update_info: dict) -> list[Future[None]]:
        return self._update_each([update_info] * len(self._clients))

    def _update_each(self, update_infos: Sequence[dict]) -> list[Future[None]]:
        return self._submit_each(
            lambda client, info: client.update_weights(info, timeout_s=self._time_left()), update_infos
        )

    def _call_servers(self, call: Callable[[RolloutClient], None]) -> None:
        for future in self._submit_each(lambda client, _: call(client), self._clients):
            future.result()

    def _submit_each(
        self, call: Callable[[RolloutClient, Any], None], arguments: Sequence[Any]
    ) -> list[Future[None]]:
        assert self._pool is not None
        return [
            self._pool.submit(call, client, argument)
            for client, argument in zip(self._clients, arguments, strict=True)
        ]


def _has_failed(replies: Iterable[Future[None]]) -> bool:
    return any(reply.done() and reply.exception() is not None for reply in replies)


def _raise_first(replies: Iterable[Future[None]]) -> None:
    """Raise the first error among the replies that have come."""
    for reply in replies:
        if reply.done():
            reply.result()


def _address_of(url: str) -> str:
    """The numeric address of a server."""
    return resolve(urlsplit(url).hostname or "")
