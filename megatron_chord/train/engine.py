"""The rollout servers of a run: pushes weights before each use, replaces a dead server, stops servers at the end.

Every method is called on every rank. Only the coordinator has processes and connections. If it fails, every rank raises
the same error, so that no rank waits forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

import torch

from megatron_chord.config import RunConfig
from megatron_chord.families.table import read_shape
from megatron_chord.network import address_towards, loopback
from megatron_chord.precision import preset
from megatron_chord.rollout.auth import KEY_VARIABLE
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.fleet import Fleet, JobServers, ListedServers, OwnServers
from megatron_chord.rollout.registry import JobRollout, Registry, read_key
from megatron_chord.rollout.replies import RolloutError, StaleWeights
from megatron_chord.rollout.server import (
    RolloutServer,
    ServerError,
    ServerSettings,
    named_gpus,
    number_of_servers,
    start_server,
    visible_to_server,
)
from megatron_chord.rollout.sync import SyncError, SyncSettings, TransportName, WeightSync
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.offload import Offload
from megatron_chord.train.router_replay import router_replay
from megatron_chord.train.state import TrainState
from megatron_chord.train.stop import StopWanted

P = ParamSpec("P")
T = TypeVar("T")


def server_settings(run: RunConfig) -> ServerSettings:
    """The settings of a server on this machine that this run or its job starts."""
    return ServerSettings(
        dtype=run.rollout.dtype or run.model.dtype,
        max_model_len=run.data.max_prompt_tokens + run.data.max_response_tokens,
        tensor=run.rollout.tensor,
        fp8=preset(run.precision).rollouts,
        kv_cache_bytes=run.rollout.kv_cache_bytes,
        gpu_memory_utilization=run.rollout.gpu_memory_utilization,
        sleep_mode=run.rollout.sleep is not False and run.rollout.asynchronous is None,
        repeatable=run.rollout.repeatable,
        routes=_replays_routes(run),
        cpu_threads=max(1, len(os.sched_getaffinity(0)) // run.rollout.tensor),
    )


def count_own_servers(run: RunConfig, num_gpus: int) -> int:
    """Number of servers that a run starts on this machine: ``rollout.count``, or as many as fit on the GPUs.

    Raises:
        ValueError: the servers do not fit on the machine's ``num_gpus`` GPUs.
    """
    tensor = run.rollout.tensor
    count = number_of_servers(run.rollout.count, num_gpus=num_gpus, tensor=tensor)
    if count < 1:
        raise ValueError(
            f"{run.rollout.count or 1} servers (rollout.count) of {tensor} GPUs each (rollout.tensor) do not fit on "
            f"the {num_gpus} GPUs that CUDA finds"
        )
    return count


class RolloutEngine:
    def __init__(
        self,
        run: RunConfig,
        groups: ParallelGroups,
        *,
        is_needed: bool,
        log_folder: Path,
        notify: Callable[[str], None],
        doing: Callable[[str], None] = lambda text: None,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start servers, if ``is_needed`` and neither settings nor job provide any. Returns while they load.

        If servers run on the ranks' GPUs, wait until they are ready and put them to sleep (with ``rollout.sleep``). The
        GPUs are then free for the model.

        ``notify`` gets messages for the user, ``doing`` gets what the run is waiting for. If ``stop_wanted`` returns
        true on the coordinator, a lost server is not replaced: ``attempt`` raises StopWanted.
        """
        self._is_needed = is_needed
        self._run = run
        self._fp8 = preset(run.precision).rollouts
        self._groups = groups
        self._log_folder = log_folder
        self._notify = notify
        self._doing = doing
        self._stop_wanted = stop_wanted
        self._job = None if run.rollout.servers else JobRollout.of_environment(os.environ)
        self._fleet: Fleet | None = None
        self._clients: Sequence[RolloutClient] = ()
        self._sync: WeightSync | None = None
        self._keeps_routes = is_needed and _replays_routes(run)
        self.route_keys: Mapping[str, str] = {}
        """API key of each server, by its URL, on every rank. Empty without router replay."""
        self.route_stores: Collection[str] = ()
        """Names of the memories in which servers keep routes (``rollout.route_store``); only on the coordinator."""
        self._connected = False
        self._version: int | None = None
        self.generation = 0
        """Number of times that servers were replaced."""
        self._restarts_left = run.rollout.restarts
        self._lost = False
        self._push_failed = False
        share_gpus = self._on_trainers_gpus() and run.rollout.asynchronous is None
        self._sleeps = share_gpus if run.rollout.sleep is None else run.rollout.sleep
        self._asleep = False
        """True if some servers may be asleep. A server that was replaced is awake; waking it has no effect."""
        self._offloads = share_gpus if run.rollout.offload is None else run.rollout.offload
        self._offload: Offload | None = None
        self._sync_seconds = 0.0
        try:
            groups.once(self._start)
            if self._on_trainers_gpus():
                # While vLLM measures the free memory of the GPU, this process must not allocate any: vLLM would count
                # it as its own and start with a smaller cache or fail (v1/worker/gpu_worker.py,
                # determine_available_memory).
                self.attempt(self._await_servers)
                self.end_sampling()
        except BaseException:
            self.close()  # the caller has no engine to close
            raise

    @property
    def clients(self) -> Sequence[RolloutClient]:
        """Clients of the servers that have the weights of the last ``push_weights``; empty except on the
        coordinator."""
        return tuple(self._clients)

    def attempt(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``action``, which must itself push the weights that it needs, with the other arguments.

        If a server dies during the action, it is replaced, and the action is repeated from the beginning. This happens
        at most ``rollout.restarts`` times in a run.
        """
        while True:
            try:
                if self._lost:
                    self._replace()
                return action(*args, **kwargs)
            except StaleWeights:
                raise
            except (RolloutError, SyncError, ServerError) as error:
                self._give_up(error)

    def push_weights(self, state: TrainState, version: int) -> None:
        """Push the weights of ``state`` to the servers, unless they have this version already. Call it in
        ``attempt``."""
        if self._version == version:
            return
        self._version = None
        if self._offloads:
            self._offload = self._offload or Offload(state)
            # All ranks free their GPU memory before any server uses it.
            self._groups.together(self._offload.to_host)
        self._await_servers()
        self._doing("pushing weights")
        if self._sync is None:
            self._sync = self._make_sync()
        if self._asleep:
            # All ranks first free the memory that torch has cached for activations.
            self._groups.together(_free_cached_memory)
            self._groups.once(lambda: self._each(lambda client: client.wake_up(tags=["weights"])))
        with self._groups.pulse.phase("pushing"):
            report = self._sync.push(state.hf_tensors(), version, expected=state.expected_sums())
        self._sync_seconds += report.seconds
        if self._asleep:
            # The gathered tensors are freed, but torch has cached their memory.
            self._groups.together(_free_cached_memory)
            self._groups.once(lambda: self._each(lambda client: client.wake_up(tags=["kv_cache"])))
            self._asleep = False
        self._version = version

    @property
    def has_offloaded(self) -> bool:
        """True if training state is in host memory. It can be neither trained nor saved before ``end_sampling``."""
        return self._offload is not None and self._offload.is_on_host

    def end_sampling(self) -> None:
        """Put servers to sleep and bring the training state back to the GPU. Sampling needs another push afterwards.

        Sleeping servers drop weights and KV cache. Servers that do not sleep (``rollout.sleep``) are not changed.
        """
        if self._sleeps and self._connected and not self._lost and not self._asleep:
            self._asleep, self._version = True, None
            try:
                self._groups.once(lambda: self._each(lambda client: client.sleep(level=2)))
            except RolloutError as error:
                # The loop checks for stop requests itself, and it may be saving a checkpoint now.
                with contextlib.suppress(StopWanted):
                    self._give_up(error)
        if self._offload is not None:
            self._groups.together(self._offload.to_device)

    def close(self) -> None:
        """Stop the servers and close the connections of this rank, without waiting for other ranks."""
        if self._asleep and self._run.rollout.servers:
            with contextlib.suppress(RolloutError):
                self._each(lambda client: client.wake_up(tags=["weights", "kv_cache"]))
        if self._sync is not None:
            self._sync.close()
        if self._fleet is not None:
            self._fleet.close()

    def take_sync_seconds(self) -> float:
        """Seconds that pushes of weights took since the last call."""
        seconds, self._sync_seconds = self._sync_seconds, 0.0
        return seconds

    def _on_trainers_gpus(self) -> bool:
        """True if the servers run on the GPUs of the ranks."""
        apart = self._run.rollout.servers or (self._job is not None and self._job.transport == "broadcast")
        return torch.cuda.is_available() and self._is_needed and not apart

    def _await_servers(self) -> None:
        if not self._connected:
            self._doing("waiting for vLLM to load")
            with self._groups.pulse.phase("waiting for servers"):
                self.route_keys = self._groups.once(self._connect)
            self._connected = True

    def _each(self, action: Callable[[RolloutClient], None]) -> None:
        """Run ``action`` on all servers in parallel, on the coordinator."""
        with ThreadPoolExecutor(max(1, len(self._clients))) as pool:
            list(pool.map(action, self._clients))

    def _give_up(self, error: Exception) -> None:
        """Mark the servers as lost, so that they are replaced. Raise ``error`` if no restart is left.

        Slurm ends the servers of a job that it preempts. The run must then stop and not wait for new ones: StopWanted.
        """
        if self._groups.once(self._stop_wanted):
            self._lost = True
            raise StopWanted from error
        if self._restarts_left == 0 or self._run.rollout.servers:
            raise error
        self._restarts_left -= 1
        self._notify(f"a rollout server is lost; a new one is started ({error})")
        self._lost = True
        self._push_failed = isinstance(error, SyncError)

    def _make_sync(self) -> WeightSync:
        groups, rollout = self._groups, self._run.rollout
        exporters = [rank for rank, exports in enumerate(groups.gather(groups.is_exporter)) if exports]
        return WeightSync(
            self._clients,
            SyncSettings(
                transport=self._transport(),
                timeout_s=self._run.timeouts.weight_push_s,
                pause_mode="keep" if rollout.in_flight == "keep" else "wait",
                host=self._job.address if self._job is not None else _address_towards(rollout.servers),
                quantization=self._fp8.quantization if self._fp8 is not None else None,
            ),
            exporters=exporters,
            group=groups.objects if groups.world_size > 1 else None,
            device=groups.device,
        )

    def _transport(self) -> TransportName:
        rollout = self._run.rollout
        if rollout.transport != "auto":
            return rollout.transport
        if self._job is not None:
            return self._job.transport
        if not torch.cuda.is_available():
            return "file"
        # The trainer's own servers share its GPUs, and NCCL does not allow two ranks on one GPU.
        return "broadcast" if rollout.servers else "ipc"

    def _start(self) -> None:
        if self._is_needed:
            self._fleet = self._make_fleet()
            self._fleet.start()

    def _make_fleet(self) -> Fleet:
        run, timeout_s = self._run, self._run.timeouts.server_start_s
        # Requests pause during a push, so the limit must be longer than a push.
        silence_s = run.watchdog.server_s + (
            run.timeouts.weight_push_s if run.rollout.in_flight == "keep" else 0.0
        )
        if run.rollout.servers:
            key = os.environ.get(KEY_VARIABLE)
            if not key:
                raise ValueError(f"rollout.servers need their key in the environment variable {KEY_VARIABLE}")
            return ListedServers(run.rollout.servers, key, silence_s=silence_s)
        if self._job is not None:
            key = read_key(self._job.folder)
            registry = Registry(self._job.folder)
            return JobServers(
                registry,
                self._job.count,
                key=key,
                timeout_s=timeout_s,
                silence_s=silence_s,
                stop_wanted=self._stop_wanted,
            )
        gpus = named_gpus(os.environ, torch.cuda.device_count())
        count = count_own_servers(run, len(gpus))
        return OwnServers(
            [partial(self._start_own, index, count, gpus) for index in range(count)],
            timeout_s=timeout_s,
            silence_s=silence_s,
        )

    def _start_own(self, index: int, count: int, gpus: Sequence[str]) -> RolloutServer:
        settings = server_settings(self._run)
        settings = dataclasses.replace(
            settings,
            visible_devices=visible_to_server(gpus, index, settings.tensor, with_ranks=True),
            cpu_threads=max(1, settings.cpu_threads // count),
        )
        return start_server(self._run.model.path, settings, log=self._next_log())

    def _next_log(self) -> Path:
        return self._log_folder / f"rollout-server-{len(list(self._log_folder.iterdir())) + 1}.log"

    def _connect(self) -> Mapping[str, str]:
        assert self._fleet is not None
        self._clients = self._fleet.connect()
        keys = self._keys_of_routes()
        if self.route_stores:
            # A server of the user may still have the routes of an earlier run.
            self._each(lambda client: _release(client, through=None))
        return keys

    def _keys_of_routes(self) -> Mapping[str, str]:
        """The ``route_keys`` of the present servers. Notes their ``route_stores``."""
        if not self._keeps_routes:
            return {}
        names = [client.route_store() for client in self._clients]
        self.route_stores = {name for name in names if name is not None}
        return {client.url: client.api_key for client in self._clients}

    def release_routes(self, step: int) -> None:
        """Let the servers free the routes of the steps up to ``step``, whose micro-batches all ranks have."""
        if self.route_stores:
            self._each(lambda client: _release(client, through=step))

    def _replace(self) -> None:
        """Replace lost servers by new ones. They get their weights with the next push."""

        def restart() -> Mapping[str, str]:
            assert self._fleet is not None
            # After a failed push every server has a mixture of old and new weights, so all are replaced.
            self._clients = self._fleet.replace(everything=self._push_failed)
            if self._sync is not None:
                self._sync.reconnect(self._clients)
            return self._keys_of_routes()

        self._version = None
        # vLLM starts only if its share of the GPU memory is free.
        if self._offload is not None:
            self._groups.together(self._offload.to_host)
        _free_cached_memory()
        self._doing("waiting for a new vLLM server")
        with self._groups.pulse.phase("waiting for servers"):
            self.route_keys = self._groups.once(restart)
        self._connected = True
        self.generation += 1
        self._lost = False


def _replays_routes(run: RunConfig) -> bool:
    return router_replay(run, read_shape(run.model.path)).is_on


def _release(client: RolloutClient, *, through: int | None) -> None:
    with contextlib.suppress(RolloutError):  # a server that is lost has freed them
        client.release_routes(through=through)


def _free_cached_memory() -> None:
    """Free torch's cached GPU memory, so that other processes on this rank's GPU can use it.

    It includes staging buffers that larger ones have replaced and that the servers have closed (``IpcTransport``).
    torch otherwise frees these only when an allocation fails.
    """
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def _address_towards(servers: Sequence[str]) -> str:
    """The address under which the servers can reach this machine."""
    if not servers:
        return loopback()
    return address_towards(urlsplit(servers[0]).hostname or "")
