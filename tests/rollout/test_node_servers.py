"""A dead server beside ranks on GPUs starts again only when the trainer gives it up. The servers are real."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.servers import NodeServers, order_of
from megatron_chord.config import RolloutConfig, TimeoutsConfig
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.registry import KEY_FILE, Registry
from megatron_chord.rollout.replies import GenerateRequest, RolloutError
from tests.rollout.helpers import START_S
from tests.support.tiny import save_model, tiny_run


def test_the_trainer_decides_when_a_dead_server_comes_back(tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path / "model")
    run = tiny_run(folder)
    run = replace(
        run,
        data=replace(run.data, max_prompt_tokens=64),
        rollout=RolloutConfig(kv_cache_bytes=64 << 20, restarts=1),
        timeouts=TimeoutsConfig(server_start_s=2 * START_S),
    )
    (tmp_path / KEY_FILE).touch(mode=0o600)
    (tmp_path / KEY_FILE).write_text("k" * 40)
    job = Job(
        folder=tmp_path,
        nodes=(Node(name="here", address="127.0.0.1"),),
        index=0,
        port=0,
        num_rollout_nodes=0,
        ranks_per_node=1,
        gpus=("0",),  # on a machine without this GPU the server runs without one
        servers_per_node=None,
    )
    registry, said = Registry(tmp_path), list[str]()
    servers = NodeServers(job, order_of(run, job), say=said.append)

    def watch(until: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            servers.watch()
            time.sleep(0.1)
        return until()

    def life(number: int) -> bool:
        announced = registry.announced(0)
        return announced is not None and announced.life == number

    try:
        assert watch(lambda: life(0), 2 * START_S), said
        os.killpg(servers._slots[0].process.pid, signal.SIGKILL)
        assert not watch(lambda: len(said) > 1, 3.0), said
        registry.give_up(0, 0)
        assert watch(lambda: life(1), 2 * START_S), said
        _check_that_kill_ends_an_open_request(servers)
    finally:
        servers.stop()
    assert [text.split(" on here ")[-1] for text in said] == [
        "is ready",
        "ended with code -9; starting a new one",
        "is ready",
    ]


def _check_that_kill_ends_an_open_request(servers: NodeServers) -> None:
    """The server hangs, as one that Slurm ends can. The trainer's request must not wait for it."""
    server = servers._slots[0].process
    request = GenerateRequest(
        prompt_ids=(5, 6), num_rollouts=1, seed=3, temperature=1.0, max_tokens=40, stop_token_ids=()
    )
    with (
        contextlib.closing(RolloutClient(server.url, server.api_key)) as client,
        ThreadPoolExecutor() as pool,
    ):
        os.killpg(server.pid, signal.SIGSTOP)
        answer = pool.submit(client.generate, [request], version=0, deadline_s=10 * START_S)
        assert not wait([answer], timeout=1.0).done
        servers.kill()
        with pytest.raises(RolloutError, match="after 3 attempts"):
            answer.result(START_S)
