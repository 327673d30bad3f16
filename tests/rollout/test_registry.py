"""The nodes and the trainer of a job announce servers in one folder, which also holds the key."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_chord.precision import Fp8Rollouts
from megatron_chord.rollout.fleet import JobServers
from megatron_chord.rollout.registry import (
    Announcement,
    JobNodes,
    JobRollout,
    Registry,
    ServerOrder,
    read_key,
)
from megatron_chord.rollout.server import ServerError, ServerSettings


def test_announcements_and_what_was_given_up(tmp_path: Path) -> None:
    node, trainer = Registry(tmp_path), Registry(tmp_path)
    assert trainer.announced(3) is None
    assert node.given_up(3) == -1
    first = Announcement(url="http://10.0.0.1:4000", node="a1", life=0)
    node.announce(3, first)
    assert trainer.announced(3) == first
    trainer.give_up(3, 0)
    assert node.given_up(3) == 0
    assert node.given_up(4) == -1
    second = Announcement(url="http://10.0.0.1:4001", node="a1", life=1)
    node.announce(3, second)
    assert trainer.announced(3) == second


def test_the_key_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("x" * 40 + "\n")
    assert read_key(tmp_path) == "x" * 40
    os.chmod(path, 0o640)
    with pytest.raises(ValueError, match="mode 0600; it has mode 0640"):
        read_key(tmp_path)


def test_an_empty_key_is_none(tmp_path: Path) -> None:
    (tmp_path / "key").touch(mode=0o600)
    with pytest.raises(ValueError, match="at least 20 characters, it has 0"):
        read_key(tmp_path)


def test_what_a_node_tells_its_ranks(tmp_path: Path) -> None:
    told = JobRollout(folder=tmp_path, count=4, address="10.0.0.1", transport="gloo")
    assert JobRollout.of_environment(told.to_variable()) == told
    assert JobRollout.of_environment({}) is None


def test_servers_that_nobody_announces_or_that_have_gone(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    registry.announce(1, Announcement(url=url, node="a1", life=0))
    servers = JobServers(registry, 3, key="x" * 40, timeout_s=0.5, silence_s=60, stop_wanted=lambda: False)
    with pytest.raises(ServerError, match=r"of the job's 3 rollout servers.* not ready after 0 s: 0, 1, 2"):
        servers.connect()


def test_a_stop_ends_the_wait_for_servers(tmp_path: Path) -> None:
    servers = JobServers(
        Registry(tmp_path), 1, key="x" * 40, timeout_s=600, silence_s=60, stop_wanted=lambda: True
    )
    with pytest.raises(ServerError, match="a stop was requested"):
        servers.connect()


@pytest.mark.parametrize(
    "fp8", [None, Fp8Rollouts(quantization="fp8_per_block", environment={"VLLM_USE_DEEP_GEMM_E8M0": "0"})]
)
def test_the_servers_of_an_evaluation_are_ordered_once_they_are_known(
    tmp_path: Path, fp8: Fp8Rollouts | None
) -> None:
    settings = ServerSettings(dtype="bf16", max_model_len=160, tensor=2, kv_cache_bytes=1 << 20, fp8=fp8)
    order = ServerOrder(model=tmp_path / "policy", settings=settings, count=4, start_s=60.0, restarts=3)
    assert Registry(tmp_path).ordered() is None
    Registry(tmp_path).order(order)
    assert Registry(tmp_path).ordered() == order


def test_what_a_node_tells_its_evaluation(tmp_path: Path) -> None:
    nodes = JobNodes(folder=tmp_path, count=3)
    assert JobNodes.of_environment(nodes.to_variables()) == nodes
    assert JobNodes.of_environment({"PATH": "/bin"}) is None
