"""New weights from the trainer to its rollout servers, and the proof that they arrived.

Every rank calls ``WeightSync.push``. The exporters (the ranks whose iterator yields tensors, one per pipeline stage)
send bucket by bucket, one exporter after another; rank 0, the coordinator, tells the servers what comes:

    rank 0      pause -> start ->  update (bucket) ... update (bucket)  -> finish(version) -> check -> resume
    exporters                      publish, transmit   publish, transmit
    others                         take part in the iterator's collectives

A server verifies each tensor's fingerprint as it arrives and, at the end, that no parameter was left out. When
anything fails, every rank raises the same SyncError and the servers stay paused: their weights are then neither the
old nor the new ones, and the caller must restart them (``reconnect``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.precision import Quantization
from megatron_chord.processes import SHARED_MEMORY, PrivateFolder
from megatron_chord.rollout.buckets import describe, in_buckets
from megatron_chord.rollout.client import PauseMode, RolloutClient
from megatron_chord.rollout.rank_messenger import RankMessenger
from megatron_chord.rollout.transports import (
    BroadcastTransport,
    FileTransport,
    IpcTransport,
    Parcel,
    SenderStore,
    Transport,
)
from megatron_chord.timing import Timer

TransportName = Literal["file", "gloo", "broadcast", "ipc"]
COORDINATOR = 0
BUCKET_BYTES: dict[TransportName, int] = {
    "file": 64 << 20,
    "gloo": 64 << 20,
    "broadcast": 256 << 20,
    "ipc": 256 << 20,
}
"""Through main memory a bucket takes long beside the request that announces it: small ones overlap sooner."""
_ANSWER_S = 10.0
"""Added to a deadline for the exchange of what went wrong once it has passed."""


class SyncError(RuntimeError):
    """A push failed, on every rank alike. The servers must be restarted before they sample again."""


@dataclass(frozen=True)
class SyncReport:
    """What a push cost."""

    version: int
    num_bytes: int
    """Of all exporters together."""
    seconds: float
    phases: dict[str, float]
    """Of these seconds, on this rank: connect; start (pause the servers, and tell them); export, fingerprint and copy
    of its buckets; wait (for the servers to have them, and for other ranks); finish (and check, and resume)."""


@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """The same on all ranks, but for `host`."""

    transport: TransportName
    timeout_s: float
    """Of one push."""
    folder: Path = SHARED_MEMORY
    """``file`` only: where rank 0 makes a private folder. In memory that all exporters and servers share."""
    host: str = "127.0.0.1"
    """``broadcast`` and ``gloo`` only: address of this rank that the servers can reach."""
    bucket_bytes: int | None = None
    """At most, but for a larger tensor; ``BUCKET_BYTES`` where left out."""
    pause_mode: PauseMode = "wait"
    """What becomes of requests that are being sampled when a push begins (``RolloutClient.pause``)."""
    quantization: Quantization | None = None
    """What the servers make of the weights; one that was started with another is refused."""


class WeightSync:
    """Connects lazily: the first push, and the first after ``reconnect``, also sets the transport up."""

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
            clients: the servers; on rank 0 only, empty on the others.
            exporters: ranks (of `group`) whose iterator yields tensors.
            group: gloo group of all trainer ranks, or None in a run of one process.
            device: of this rank's tensors; cuda makes ``broadcast`` use NCCL, and the servers must be on GPUs too.
        """
        self._clients = tuple(clients)
        self._settings = settings
        self._exporters = tuple(exporters)
        self._exchange = RankMessenger(group)
        self._device = device
        self._bucket_bytes = settings.bucket_bytes or BUCKET_BYTES[settings.transport]
        self._folder: Path | None = None
        self._private: PrivateFolder | None = None
        """The same, on rank 0."""
        self._transport: Transport | None = None
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
        return self._exchange.rank == COORDINATOR

    def reconnect(self, clients: Sequence[RolloutClient]) -> None:
        """The servers were restarted; `clients` are the new ones. Needed on rank 0 only."""
        assert self._is_coordinator
        assert len(clients) == len(self._clients)
        self._clients = tuple(clients)
        self._connected = False

    def close(self) -> None:
        """Removes the private folder and drops the groups."""
        self._transport = None
        self._connected = False
        if self._pool is not None:
            self._pool.shutdown(wait=False)
        if self._private is not None:
            self._private.close()
        self._folder = None

    def push(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Replaces the servers' weights by `named_tensors` and their version by `version`.

        Args:
            named_tensors: every Hugging Face tensor, full, by name, each from exactly one exporter; other ranks
                yield nothing. It is iterated to its end on every rank, also after a failure, as long as the
                connection stood; it must not need collectives between exporters. A tensor must keep its
                content until the iterator has moved on by a bucket.

        Raises:
            SyncError: on every rank. A rank that died is noticed at the deadline.
        """
        begun, timer = time.monotonic(), Timer()
        self._timer = timer
        self._deadline = begun + self._settings.timeout_s
        try:
            with timer.phase("connect"):
                self._connect()
            with timer.phase("start"):
                self._together(self._open_update, rank=COORDINATOR)
            num_bytes = sum(self._together(lambda: self._stream(named_tensors)))
            with timer.phase("finish"):
                self._together(lambda: self._close_update(version), rank=COORDINATOR)
        except BaseException:
            self._connected = False
            self._transport = None
            raise
        seconds = time.monotonic() - begun
        timer.seconds["wait"] = seconds - sum(timer.seconds.values())
        return SyncReport(version, num_bytes, seconds, timer.seconds)

    def _together(self, action: Callable[[], Any], *, rank: int | None = None) -> list[Any]:
        """Runs `action` on every rank, or on `rank`, and shares the outcomes: results, or SyncError everywhere."""
        result, failure = None, None
        try:
            if rank is None or rank == self._exchange.rank:
                result = action()
        except Exception as error:
            failure = error
        outcome = {"result": result, "error": failure and f"{type(failure).__name__}: {failure}"}
        try:
            outcomes = self._exchange.all_gather(outcome, max(self._remaining(), 0.0) + _ANSWER_S)
        except RuntimeError as error:
            raise SyncError(f"a trainer rank did not answer during a push of weights: {error}") from error
        errors = [f"rank {i}: {other['error']}" for i, other in enumerate(outcomes) if other["error"]]
        if errors:
            raise SyncError("; ".join(errors)) from failure
        return [outcome["result"] for outcome in outcomes]

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def _time_left(self) -> float:
        """Seconds to the deadline; TimeoutError when it has passed."""
        remaining = self._remaining()
        if remaining <= 0:
            raise TimeoutError(f"the push of weights took more than {self._settings.timeout_s:.0f} s")
        return remaining

    def _connect(self) -> None:
        plan = self._together(self._plan, rank=COORDINATOR)[COORDINATOR]
        if plan is None:
            return
        store: SenderStore | None = None

        def listen() -> list | None:
            nonlocal store
            needs_group = self._settings.transport in ("broadcast", "gloo")
            if not needs_group or self._exchange.rank not in self._exporters:
                return None
            store = SenderStore(self._settings.host, self._settings.timeout_s)
            return [store.host, store.port]

        places = self._together(listen)
        endpoints = [place for place in places if place is not None]
        self._folder = Path(plan["folder"]) if plan["folder"] is not None else None
        self._together(lambda: self._meet(store, plan["workers"], endpoints))

    def _plan(self) -> dict | None:
        """None when connected. Workers of each server; for files, a new private folder."""
        if self._connected:
            return None
        if self._settings.transport == "file" and self._folder is None:
            self._private = PrivateFolder(self._settings.folder)
            self._folder = self._private.path
        workers = [client.num_workers(timeout_s=self._time_left()) for client in self._clients]
        return {"workers": workers, "folder": None if self._folder is None else str(self._folder)}

    def _meet(self, store: SenderStore | None, workers: Sequence[int], endpoints: list[list]) -> None:
        """The servers are told where the exporters are, while these wait for the servers' workers."""
        told: list[Future[None]] = []
        if self._is_coordinator:
            first_workers = [sum(workers[:i]) for i in range(len(workers))]
            told = self._tell_each(
                lambda client, first: client.init_weight_transfer(
                    {
                        "transport": self._settings.transport,
                        "timeout_s": self._settings.timeout_s,
                        "folder": None if self._folder is None else str(self._folder),
                        "endpoints": endpoints,
                        "num_workers": sum(workers),
                        "first_worker": first,
                        "quantization": self._settings.quantization,
                    },
                    timeout_s=self._time_left(),
                ),
                first_workers,
            )
        if self._exchange.rank in self._exporters:
            self._transport = self._make_transport(store, sum(workers))
        for future in told:
            future.result()
        self._connected = True

    def _make_transport(self, store: SenderStore | None, num_workers: int) -> Transport:
        sender = self._exporters.index(self._exchange.rank)
        if self._settings.transport == "file":
            assert self._folder is not None
            return FileTransport(self._folder, sender)
        if self._settings.transport == "ipc":
            return IpcTransport(sender, num_workers, self._device)
        assert store is not None
        device = torch.device("cpu") if self._settings.transport == "gloo" else self._device
        group = store.form_group(num_workers, device)
        return BroadcastTransport(group, sender, device, self._settings.timeout_s)

    def _open_update(self) -> None:
        self._tell(lambda client: client.pause(mode=self._settings.pause_mode, timeout_s=self._time_left()))
        self._tell(lambda client: client.start_weight_update(timeout_s=self._time_left()))

    def _close_update(self, version: int) -> None:
        self._tell(lambda client: client.finish_weight_update(version, timeout_s=self._time_left()))
        for client in self._clients:
            served = client.weight_version(timeout_s=self._time_left())
            if served != version:
                raise RuntimeError(f"{client.url} serves weight version {served} after a push of {version}")
        self._tell(lambda client: client.resume(timeout_s=self._time_left()))

    def _stream(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Sends this rank's tensors and, on the coordinator, serves the other exporters. Bytes sent by this rank."""
        tensors = iter(named_tensors)
        failure: Exception | None = None
        num_bytes = 0
        try:
            num_bytes = self._send_all(tensors)
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

    def _send_all(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        if self._transport is None:
            for name, _ in tensors:
                raise RuntimeError(f"rank {self._exchange.rank} is no exporter but yields {name}")
            return 0
        send = self._send_own if self._is_coordinator else self._send_by_coordinator
        num_bytes = 0
        parcels: list[Parcel] = []
        arrived: Callable[[], None] | None = None
        try:
            for bucket in self._timer.each("export", in_buckets(tensors, self._bucket_bytes)):
                # Gathered, fingerprinted and laid out while the servers take the bucket before.
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
        except _Refused:
            raise
        except Exception:
            if arrived is not None:
                arrived()  # or its answer would be taken for the next one
            self._say_end()
            raise
        finally:
            for parcel in parcels:
                parcel.release()
        self._say_end()
        return num_bytes

    def _say_end(self) -> None:
        if not self._is_coordinator:
            self._exchange.send(None, COORDINATOR, self._time_left())

    def _send_own(self, update_info: dict, parcel: Parcel) -> Callable[[], None]:
        """Has the parcel on its way; what it returns waits until the servers have it."""
        told = self._tell_of(update_info)

        def arrived() -> None:
            for future in told:
                future.result()

        try:
            parcel.transmit(lambda: any(future.done() and future.exception() for future in told))
        except Exception:
            for future in told:
                if future.done():
                    future.result()  # a server's reason says more than "the receivers gave up"
            raise
        return arrived

    def _send_by_coordinator(self, update_info: dict, parcel: Parcel) -> Callable[[], None]:
        """An exporter's side of ``_serve``, for one bucket; as ``_send_own``."""
        self._exchange.send(update_info, COORDINATOR, self._time_left())
        self._hear()  # the servers are being told
        parcel.transmit(lambda: False)
        return self._hear  # the servers have it

    def _hear(self) -> None:
        refusal = self._exchange.receive(COORDINATOR, self._time_left())
        if refusal is not None:
            raise _Refused(f"stopped, since {refusal}")

    def _serve(self, exporter: int, refusal: str | None) -> str | None:
        """The coordinator's side: tells the servers of each of an exporter's buckets. Why the push failed, or None."""
        while True:
            update_info = self._exchange.receive(exporter, self._time_left())
            if update_info is None:
                return refusal
            told = [] if refusal is not None else self._tell_of(update_info)
            self._exchange.send(refusal, exporter, self._time_left())
            if refusal is not None:
                return refusal
            try:
                for future in told:
                    future.result()
            except Exception as error:
                refusal = str(error)
            self._exchange.send(refusal, exporter, self._time_left())
            if refusal is not None:
                return refusal

    def _tell_of(self, update_info: dict) -> list[Future[None]]:
        return self._tell_each(
            lambda client, _: client.update_weights(update_info, timeout_s=self._time_left()), self._clients
        )

    def _tell(self, call: Callable[[RolloutClient], None]) -> None:
        for future in self._tell_each(lambda client, _: call(client), self._clients):
            future.result()

    def _tell_each(
        self, call: Callable[[RolloutClient, Any], None], arguments: Sequence[Any]
    ) -> list[Future[None]]:
        assert self._pool is not None
        return [
            self._pool.submit(call, client, argument)
            for client, argument in zip(self._clients, arguments, strict=True)
        ]


class _Refused(RuntimeError):
    """The coordinator does not want the rest."""
