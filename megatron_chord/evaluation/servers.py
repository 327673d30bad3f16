"""The vLLM servers of an evaluation: its own, those of a job's nodes, or running ones that get the policy's weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from megatron_chord.config_suite import ServerConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.network import address_towards, loopback
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.fleet import Fleet, JobServers, OwnServers
from megatron_chord.rollout.registry import JobNodes, Registry, ServerOrder, read_key
from megatron_chord.rollout.server import (
    ServerError,
    ServerSettings,
    named_gpus,
    number_of_servers,
    start_server,
    visible_to_server,
)
from megatron_chord.rollout.sync import SyncError, SyncSettings, WeightSync
from megatron_chord.weights.folder import open_model

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Servers(Protocol):
    @property
    def version(self) -> int | None:
        """Version of the weights that sample; None: the weights with which the servers were started."""
        ...

    def connect(self) -> Sequence[RolloutClient]:
        """Clients of servers that are ready and have the policy's weights.

        Call it again after a failure: it replaces the servers that do not answer, or all of them if all answer.

        Raises:
            ServerError: a server is not ready in time.
        """
        ...

    def close(self) -> None: ...


class FleetServers:
    """Servers that were started with the policy's weights."""

    version = None

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._is_started = False

    def connect(self) -> Sequence[RolloutClient]:
        if self._is_started:
            return self._fleet.replace(everything=False)
        self._is_started = True
        self._fleet.start()
        return self._fleet.connect()

    def close(self) -> None:
        self._fleet.close()


def own_servers(
    model: Path,
    settings: ServerConfig,
    *,
    max_model_len: int,
    logs: Path,
    say: Callable[[str], None],
) -> FleetServers:
    """Servers that this process starts. Each has its own GPUs; without GPUs they share the cores.

    Raises:
        ValueError: the servers do not fit on the GPUs.
    """
    devices = devices_of_servers(settings, named_gpus(os.environ, torch.cuda.device_count()))
    shared = _server_settings(settings, max_model_len=max_model_len, count=len(devices))
    logs.mkdir(parents=True, exist_ok=True)
    say(f"starting {len(devices)} vLLM server{'s' if len(devices) > 1 else ''}, logs in {logs}")
    starts = [
        partial(
            start_server,
            model,
            dataclasses.replace(shared, visible_devices=visible),
            log=logs / f"server-{index}.log",
        )
        for index, visible in enumerate(devices)
    ]
    return FleetServers(OwnServers(starts, timeout_s=settings.start_s, silence_s=settings.silence_s))


def servers_of_job(
    job: JobNodes, model: Path, settings: ServerConfig, *, max_model_len: int, say: Callable[[str], None]
) -> FleetServers:
    """Servers that all nodes of a job start (``cluster.evaluate``). ``model`` is on the shared file system.

    Raises:
        ValueError: the servers do not fit on the GPUs, or other users can read the key.
    """
    key, registry = read_key(job.folder), Registry(job.folder)
    count = len(devices_of_servers(settings, named_gpus(os.environ, torch.cuda.device_count())))
    order = ServerOrder(
        model=model,
        settings=_server_settings(settings, max_model_len=max_model_len, count=count),
        count=count,
        start_s=settings.start_s,
        restarts=settings.restarts,
    )
    registry.order(order)
    say(f"starting {count} vLLM server{'s' if count > 1 else ''} on each of {job.count} nodes")
    fleet = JobServers(
        registry,
        job.count * count,
        key=key,
        timeout_s=settings.start_s,
        silence_s=settings.silence_s,
        stop_wanted=lambda: False,
    )
    return FleetServers(fleet)


def _server_settings(settings: ServerConfig, *, max_model_len: int, count: int) -> ServerSettings:
    """``count``: number of servers that share the cores of a machine."""
    cores = len(os.sched_getaffinity(0))
    return ServerSettings(
        dtype=settings.dtype,
        max_model_len=max_model_len,
        tensor=settings.tensor,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        cpu_threads=max(1, cores // (settings.tensor * count)),
        repeatable=settings.repeatable,
    )


class ListedServers:
    """Running servers (docs/running.md says how to start them). They get the policy's weights, which are verified."""

    version = 0

    def __init__(
        self,
        urls: Sequence[str],
        key: str,
        model: Path,
        shape: ModelShape,
        *,
        silence_s: float,
        push_s: float,
    ) -> None:
        self._urls = urls
        self._key = key
        self._silence_s = silence_s
        self._clients: list[RolloutClient] = []
        self._model = model
        self._shape = shape
        self._push_s = push_s

    def connect(self) -> Sequence[RolloutClient]:
        self.close()
        self._clients = [RolloutClient(url, self._key, silence_s=self._silence_s) for url in self._urls]
        hosts = [urlsplit(url).hostname or "" for url in self._urls]
        here = all(host in _LOOPBACK for host in hosts)
        on_cpu = not torch.cuda.is_available()
        settings = SyncSettings(
            transport="file" if here and on_cpu else "gloo",
            timeout_s=self._push_s,
            host=loopback() if here else address_towards(hosts[0]),
        )
        sync = WeightSync(self._clients, settings, exporters=[0], group=None, device=torch.device("cpu"))
        reader = open_model(self._model, self._shape.weights)
        names = [name for name in self._shape.weights.hf_names() if name in reader.file_of]
        try:
            sync.push(((name, reader.read(name)) for name in names), self.version)
        except SyncError as error:
            raise ServerError(f"the servers did not load the weights of {self._model}: {error}") from error
        finally:
            sync.close()
        return self._clients

    def close(self) -> None:
        for client in self._clients:
            client.close()


def devices_of_servers(settings: ServerConfig, devices: Sequence[str]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server; None without GPUs.

    Raises:
        ValueError: the servers do not fit on the GPUs.
    """
    count = number_of_servers(settings.count, num_gpus=len(devices), tensor=settings.tensor)
    if count < 1:
        raise ValueError(
            f"server.count {settings.count or 1} x server.tensor {settings.tensor} does not fit on {len(devices)} GPUs"
        )
    return [visible_to_server(devices, index, settings.tensor, with_ranks=False) for index in range(count)]
