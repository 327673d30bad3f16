"""Weights reach the servers of several nodes through one rank of each node. A node is an address of this machine.

The reference is Transformers with the same weights, as in test_sync.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_chord.rollout.relay import plan_relay
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server, stop_all
from tests.rollout import relay_program
from tests.rollout.helpers import START_S, make_model, weights_of
from tests.support.ranks import run_ranks

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def two_servers(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[RolloutServer]]:
    settings = ServerSettings(
        dtype="fp32", max_model_len=512, kv_cache_bytes=64 << 20, gpu_memory_utilization=0.1
    )
    logs = tmp_path_factory.mktemp("servers")
    started = [
        start_server(model_folder, settings, log=logs / f"{host}.log", host=host)
        for host in relay_program.NODES
    ]
    try:
        for server in started:
            server.wait_until_ready(START_S)
        yield started
    finally:
        for server in started:
            if server.alive():
                os.killpg(server.pid, signal.SIGCONT)
        stop_all(started)


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks without a GPU")
def test_two_nodes_with_a_publisher_that_gathers_for_another_rank(
    two_servers: list[RolloutServer], tmp_path: Path
) -> None:
    servers = [(server.url, server.api_key) for server in two_servers]
    results = run_ranks(relay_program.main, 3, servers, two_servers[1].pid, tmp_path, timeout_s=400)
    num_bytes = sum(tensor.nbytes for _, tensor in weights_of(make_model(0)))
    assert [result.num_bytes for result in results] == [num_bytes] * 3
    assert len(results[0].gaps) == 4
    assert max(results[0].gaps) < TOLERANCE
    for result in results:
        export, room, frozen = result.failures
        assert export == "rank 2: ValueError: cannot export model.layers.1.mlp.up_proj.weight"
        assert "rank 1: OSError: [Errno 28] No space left on device" in room
        assert frozen.startswith(f"rank 0: RolloutError: POST {two_servers[1].url}/update_weights")
        assert "rank 2: PushRefused: stopped because" in frozen
        assert max(result.failure_s) < 120
        assert result.answers == [0, 1, 2], "the group of all ranks still works"
        assert result.left == [], "servers have mapped the buffers, so that nothing stays after a kill"
    assert list(tmp_path.iterdir()) == []


def test_every_node_with_servers_has_one_publisher() -> None:
    ranks = ["a", "a", "b", "b", "c", "c"]
    plan = plan_relay(ranks, exporters=[0, 3], server_hosts=["a", "a", "b", "c"])
    assert plan.servers == {0: (0, 1), 3: (2,), 4: (3,)}  # an exporter if there is one, else the first rank
    assert plan.members == (0, 3, 4)
    alone = plan_relay(["a", "a"], exporters=[0], server_hosts=["a"])
    assert (alone.members, alone.servers) == ((0,), {0: (0,)})
    both = plan_relay(["a", "a"], exporters=[0, 1], server_hosts=["a"])
    assert (both.members, both.servers) == ((0, 1), {0: (0,)})


def test_a_server_without_ranks_beside_it() -> None:
    with pytest.raises(
        ValueError, match=r"no trainer rank runs on c, the node of rollout server 1; ranks run on a, b"
    ):
        plan_relay(["a", "b"], exporters=[0], server_hosts=["a", "c"])
    with pytest.raises(ValueError, match="rank 0 must be an exporter"):
        plan_relay(["a", "b"], exporters=[1], server_hosts=["a"])
