"""Real vLLM servers with a tiny random policy. A server takes about 20 s to start, so tests share as few as
possible."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from tests.rollout.helpers import START_S, make_model


class Servers:
    """One running server at a time. A new one replaces it after a test has broken it."""

    def __init__(self, model: Path, tied_model: Path, logs: Path) -> None:
        self._model = model
        self._tied_model = tied_model
        self._logs = logs
        self._started: list[RolloutServer] = []
        self._broken = True

    def healthy(self, *, tied: bool = False) -> RolloutServer:
        """Return a healthy server. If a new one must start, ``tied`` gives it the model whose lm_head is its
        embedding."""
        if self._broken:
            self.stop()
            server = start_server(
                self._tied_model if tied else self._model,
                ServerSettings(
                    dtype="fp32", max_model_len=512, kv_cache_bytes=64 << 20, gpu_memory_utilization=0.1
                ),
                log=self._logs / f"vllm-{len(self._started)}.log",
            )
            self._started.append(server)
            server.wait_until_ready(START_S)
            self._broken = False
        return self._started[-1]

    def to_be_broken(self) -> RolloutServer:
        """Return a healthy server that the test may break. No later test uses it."""
        server = self.healthy()
        self._broken = True
        return server

    def running(self) -> RolloutServer:
        """Return a running server, broken or not, for a test that kills it."""
        server = self._started[-1] if self._started and self._started[-1].alive() else self.healthy()
        self._broken = True
        return server

    def stop(self) -> None:
        for server in self._started:
            server.stop()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is empty at first, as on a fresh machine. vLLM then starts one more process for each kind of model.

    These processes must end, too. Later servers find what earlier servers have stored.
    """
    return tmp_path_factory.mktemp("vllm_cache")


@pytest.fixture(scope="module", autouse=True)
def fresh_machine(vllm_cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(vllm_cache))
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    tied = tmp_path_factory.mktemp("tied")
    make_model(seed=0, tied=True).save_pretrained(tied)
    servers = Servers(model_folder, tied, tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()
