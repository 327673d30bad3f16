"""Servers on the trainer's devices are awaited before the model is built, sleep until they are needed, and are
replaced.

A server without a GPU keeps its memory. All else is real: it reports whether it sleeps, and its parts are woken in
turn.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from megatron_chord.config import ParallelConfig, RolloutConfig, TimeoutsConfig
from megatron_chord.rollout.fleet import OwnServer
from megatron_chord.train.engine import RolloutEngine
from tests.distributed.steps import build, start_groups
from tests.rollout.helpers import START_S
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model, tiny_run


class _Shared(RolloutEngine):
    """The engine as it is where CUDA is available."""

    def _on_trainers_gpus(self) -> bool:
        return True

    def observed(self) -> dict[str, Any]:
        (client,) = self.clients
        reply = httpx.get(f"{client.url}/is_sleeping", headers=client._headers, trust_env=False, timeout=30)
        return {"sleeps": reply.json()["is_sleeping"], "version": client.weight_version()}

    def kill_server(self) -> None:
        assert isinstance(self._fleet, OwnServer)
        assert self._fleet._server is not None
        os.killpg(self._fleet._server.pid, signal.SIGKILL)


def life_of_an_engine(folder: Path, logs: Path) -> list[dict[str, Any]]:
    run = tiny_run(folder)
    run = replace(
        run,
        data=replace(run.data, max_prompt_tokens=64),
        rollout=RolloutConfig(kv_cache_bytes=64 << 20),
        timeouts=TimeoutsConfig(server_start_s=2 * START_S, weight_push_s=60),
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
        engine.push_weights(state, 0)
        seen.append(engine.observed())
        engine.rest()
        seen.append(engine.observed())
        engine.kill_server()
        engine.attempt(engine.push_weights, state, 1)
        seen.append(engine.observed() | {"replaced": engine.generation})
    finally:
        engine.close()
    return seen


def test_servers_are_awaited_and_sleep_until_weights_come(tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path / "model")
    (tmp_path / "logs").mkdir()
    (seen,) = run_ranks(life_of_an_engine, 1, folder, tmp_path / "logs", timeout_s=5 * START_S)
    assert seen == [
        {"sleeps": True, "version": None},
        {"sleeps": False, "version": 0},
        {"sleeps": True, "version": 0},
        {"has room": True},
        {"sleeps": False, "version": 1, "replaced": 1},
    ]
