"""Servers on the trainer's devices are awaited before the model is built, and sleep until they are needed. A lost one
is replaced, the others stay.

A server without a GPU keeps its memory. All else is real: it reports whether it sleeps, and its parts are woken in
turn.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
import torch
from torch import Tensor

from megatron_chord.config import ParallelConfig, RolloutConfig, TimeoutsConfig
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.fleet import OwnServers
from megatron_chord.rollout.sync import SyncError
from megatron_chord.train.engine import RolloutEngine, _free_cached_memory, count_own_servers
from megatron_chord.train.state import TrainState
from tests.distributed.steps import build, start_groups
from tests.rollout.helpers import START_S
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model, tiny_run

STALE = "rank 0: WrongExport: 1 of 47 exported tensors do not hold the trainer's parameters: model.embed_tokens.weight"


class _Shared(RolloutEngine):
    """The engine as it is where CUDA is available."""

    def _on_trainers_gpus(self) -> bool:
        return True

    def observed(self) -> dict[str, Any]:
        sleeps = [
            httpx.get(f"{client.url}/is_sleeping", headers=client._http.headers, trust_env=False, timeout=240)
            for client in self.clients
        ]
        return {
            "sleeps": [reply.json()["is_sleeping"] for reply in sleeps],
            "version": [client.weight_version() for client in self.clients],
        }

    def pids(self) -> list[int]:
        assert isinstance(self._fleet, OwnServers)
        return [server.pid for server in self._fleet._servers]


def life_of_an_engine(folder: Path, logs: Path) -> list[dict[str, Any]]:
    run = tiny_run(folder)
    run = replace(
        run,
        data=replace(run.data, max_prompt_tokens=64),
        rollout=RolloutConfig(kv_cache_bytes=64 << 20, count=2),
        timeouts=TimeoutsConfig(server_start_s=2 * START_S, weight_push_s=240),
    )
    groups = start_groups(ParallelConfig())
    seen: list[dict[str, Any]] = []

    def doing(text: str) -> None:
        if "a new vLLM server" in text:
            seen.append({"has room": engine.has_offloaded})

    engine = _Shared(run, groups, is_needed=True, log_folder=logs, notify=print, doing=doing)
    try:
        seen.append(engine.observed())
        state = build(folder, ParallelConfig(), groups=groups)
        with _memory_calls() as calls:
            engine.push_weights(state, 0)
        seen.append(engine.observed() | {"memory": calls})
        engine.end_sampling()
        seen.append(engine.observed())
        before = engine.pids()
        os.killpg(before[1], signal.SIGKILL)
        engine.attempt(engine.push_weights, state, 1)
        kept = [pid in before for pid in engine.pids()]
        seen.append(engine.observed() | {"replaced": engine.generation, "kept": kept})
        try:
            engine.push_weights(_with_stale_embedding(state), 2)
        except SyncError as error:
            seen.append({"refused": str(error)})
    finally:
        engine.close()
    return seen


@contextmanager
def _memory_calls() -> Iterator[list[str]]:
    """The calls that free torch's cached memory of a GPU, and those that let servers allocate theirs."""
    calls: list[str] = []
    wake_up = RolloutClient.wake_up

    def waking(client: RolloutClient, tags: Any) -> None:
        calls.append(" ".join(tags))
        wake_up(client, tags=tags)

    def free() -> None:
        calls.append("free")

    with (
        mock.patch("megatron_chord.train.engine._free_cached_memory", free),
        mock.patch.object(RolloutClient, "wake_up", waking),
    ):
        yield calls


def _with_stale_embedding(state: TrainState) -> Any:
    """A state whose export has the embedding before an update that changed one bit. No log-prob shows it."""

    def stale() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.hf_tensors():
            if name == "model.embed_tokens.weight":
                tensor = tensor.clone()
                tensor.view(torch.int32)[5, 3] ^= 1
            yield name, tensor

    return SimpleNamespace(hf_tensors=stale, expected_sums=state.expected_sums)


def test_servers_are_awaited_and_sleep_until_weights_come(tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path / "model")
    (tmp_path / "logs").mkdir()
    (seen,) = run_ranks(life_of_an_engine, 1, folder, tmp_path / "logs", timeout_s=5 * START_S)
    assert seen == [
        {"sleeps": [True, True], "version": [None, None]},
        {
            "sleeps": [False, False],
            "version": [0, 0],
            # The memory of activations before the push, that of gathered tensors after it.
            "memory": ["free", "weights", "weights", "free", "kv_cache", "kv_cache"],
        },
        {"sleeps": [True, True], "version": [0, 0]},
        {"has room": True},
        {"sleeps": [False, False], "version": [1, 1], "replaced": 1, "kept": [True, False]},
        {"refused": STALE},
    ]


def test_one_server_for_each_group_of_gpus() -> None:
    run = tiny_run(Path("model"))

    def count(num_gpus: int, **settings: Any) -> int:
        return count_own_servers(replace(run, rollout=RolloutConfig(**settings)), num_gpus)

    assert [count(8), count(8, tensor=2), count(3, tensor=2), count(8, count=2)] == [8, 4, 1, 2]
    assert [count(0), count(0, tensor=2), count(0, count=3)] == [1, 1, 3]
    with pytest.raises(ValueError, match=r"1 servers .* of 4 GPUs each .* do not fit on the 2 GPUs"):
        count(2, tensor=4)
    with pytest.raises(ValueError, match=r"3 servers .* of 2 GPUs each"):
        count(4, tensor=2, count=3)


def test_servers_are_stopped_if_their_start_is_interrupted(tmp_path: Path) -> None:
    fleet = mock.Mock()
    fleet.start.side_effect = SystemExit(143)
    groups: Any = SimpleNamespace(once=lambda action: action())
    with (
        mock.patch.object(RolloutEngine, "_make_fleet", return_value=fleet),
        mock.patch("megatron_chord.train.engine._replays_routes", return_value=False),
        pytest.raises(SystemExit),
    ):
        RolloutEngine(tiny_run(tmp_path), groups, is_needed=True, log_folder=tmp_path, notify=print)
    fleet.close.assert_called_once()


def test_freed_memory_includes_buffers_that_servers_have_closed() -> None:
    """torch keeps an exported buffer after its last use until it is told to look whether the receivers closed it."""
    with mock.patch("torch.cuda") as cuda:
        _free_cached_memory()
    called = [name for name, _, _ in cuda.method_calls]
    assert called == ["is_available", "ipc_collect", "empty_cache"]
