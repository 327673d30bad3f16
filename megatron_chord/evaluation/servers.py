"""The vLLM servers of an evaluation: its own on this machine, or running ones that get the policy's weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import torch

from megatron_chord.config_suite import ServerConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.network import address_towards
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.server import (
    RolloutServer,
    ServerError,
    ServerSettings,
    named_gpus,
    number_of_servers,
    start_server,
    stop_all,
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
        """Clients of servers that are ready and have the policy's weights. May be called again after a failure.

        Raises:
            ServerError: a server is not ready in time.
        """
        ...

    def close(self) -> None: ...


class OwnServers:
    """Servers that are started here. Each has its own GPUs; without GPUs it uses all cores."""

    version = None

    def __init__(
        self,
        model: Path,
        settings: ServerConfig,
        *,
        max_model_len: int,
        logs: Path,
        say: Callable[[str], None],
    ) -> None:
        self._model = model
        self._settings = settings
        self._max_model_len = max_model_len
        self._logs = logs
        self._say = say
        self._servers: list[RolloutServer] = []
        self._clients: list[RolloutClient] = []

    def connect(self) -> Sequence[RolloutClient]:
        self.close()
        devices = devices_of_servers(self._settings, named_gpus(os.environ, torch.cuda.device_count()))
        self._say(
            f"starting {len(devices)} vLLM server{'s' if len(devices) > 1 else ''}, logs in {self._logs}"
        )
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            for index, visible in enumerate(devices):
                settings = self._server_settings(visible, len(devices))
                log = self._logs / f"server-{index}.log"
                self._servers.append(start_server(self._model, settings, log=log))
            for server in self._servers:
                server.wait_until_ready(self._settings.start_s)
        except BaseException:
            self.close()
            raise
        self._clients = [
            RolloutClient(server.url, server.api_key, silence_s=self._settings.silence_s)
            for server in self._servers
        ]
        return self._clients

    def close(self) -> None:
        for client in self._clients:
            client.close()
        stop_all(self._servers)
        self._clients, self._servers = [], []

    def _server_settings(self, visible: str | None, count: int) -> ServerSettings:
        settings = self._settings
        cores = len(os.sched_getaffinity(0))
        return ServerSettings(
            dtype=settings.dtype,
            max_model_len=self._max_model_len,
            tensor=settings.tensor,
            kv_cache_bytes=settings.kv_cache_bytes,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            visible_devices=visible,
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
            host="127.0.0.1" if here else address_towards(hosts[0]),
        )
        sync = WeightSync(self._clients, settings, exporters=[0], group=None, device=torch.device("cpu"))
        reader = open_model(self._model, self._shape.weights)
        names = [name for name in self._shape.weights.hf_names() if name in reader.file_of]
        try:
            sync.push(((name, reader.read(name)) for name in names), self.version)
        except SyncError as error:
            raise ServerError(f"the servers did not take the weights of {self._model}: {error}") from error
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
