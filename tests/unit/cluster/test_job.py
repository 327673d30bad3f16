"""Which nodes train and which sample, by the variables of the batch script. Expected values are counted by hand."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from megatron_chord.cluster.job import Job, job_of

FOUR = "a1=10.0.0.1 a2=10.0.0.2 a3=10.0.0.3 a4=10.0.0.4"


def job(node: str, *, num_gpus: int = 8, nodes: str = FOUR, **variables: str) -> Job:
    environment = {
        "CHORD_JOB": "/shared/jobs/7/restart-0",
        "CHORD_NODES": nodes,
        "CHORD_PORT": "12000",
        "SLURMD_NODENAME": node,
        **variables,
    }
    return job_of(environment, num_gpus=num_gpus)


def test_colocated_on_four_nodes() -> None:
    third = job("a3")
    assert third.folder == Path("/shared/jobs/7/restart-0")
    assert (third.head.name, third.head.address, third.port) == ("a1", "10.0.0.1", 12000)
    assert (third.trains, third.samples, third.is_head) == (True, True, False)
    assert (third.world_size, third.first_rank) == (32, 16)
    assert third.num_servers(tensor=4) == 8
    assert third.first_server(third.num_servers_here(tensor=4)) == 4
    assert third.numeric_address() == "10.0.0.3"


def test_one_rollout_node_of_four() -> None:
    third, last = (job(node, CHORD_ROLLOUT_NODES="1") for node in ("a3", "a4"))
    assert (third.trains, third.samples) == (True, False)
    assert (last.trains, last.samples) == (False, True)
    assert third.world_size == 24
    assert last.num_servers(tensor=2) == 4
    assert last.first_server(last.num_servers_here(tensor=2)) == 0


def test_servers_see_their_own_gpus_first() -> None:
    beside_ranks, alone = job("a1"), job("a4", CHORD_ROLLOUT_NODES="1")
    # The other servers follow, so that a server can open the CUDA IPC handles of the ranks on its node.
    assert beside_ranks.server_devices(1, tensor=2) == "2,3,0,1,4,5,6,7"
    assert alone.server_devices(1, tensor=2) == "2,3"
    some = job("a1", num_gpus=2, CUDA_VISIBLE_DEVICES="GPU-x,GPU-y")
    assert some.server_devices(1, tensor=1) == "GPU-y,GPU-x"
    assert job("a1", num_gpus=0).server_devices(0, tensor=1) is None


@pytest.mark.parametrize(
    ("nodes", "rollout_nodes", "num_gpus", "transport"),
    [
        ("a1=h", "0", 8, "ipc"),
        (FOUR, "0", 8, "relay"),
        (FOUR, "1", 8, "broadcast"),
        ("a1=h", "", 0, "file"),
        (FOUR, "0", 0, "relay"),
        (FOUR, "1", 0, "gloo"),
    ],
)
def test_how_weights_travel(nodes: str, rollout_nodes: str, num_gpus: int, transport: str) -> None:
    one = job("a1", nodes=nodes, num_gpus=num_gpus, CHORD_ROLLOUT_NODES=rollout_nodes)
    assert one.transport() == transport


def test_without_gpus_a_node_has_one_rank_and_one_server() -> None:
    # Slurm may report GPUs that CUDA does not find.
    node = job("a2", num_gpus=0, CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert (node.ranks_per_node, node.world_size, node.num_servers(tensor=1)) == (1, 4, 4)
    assert node.gpus == ()


def test_numbers_asked_for() -> None:
    node = job("a2", CHORD_RANKS_PER_NODE="2", CHORD_SERVERS_PER_NODE="3")
    assert (node.world_size, node.num_servers(tensor=2)) == (8, 12)
    with pytest.raises(ValueError, match=r"5 rollout servers of rollout.tensor 2 do not fit on the 8 GPUs"):
        job("a2", CHORD_SERVERS_PER_NODE="5").num_servers_here(tensor=2)
    with pytest.raises(ValueError, match=r"0 rollout servers of rollout.tensor 16"):
        job("a2").num_servers_here(tensor=16)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURMD_NODENAME": "b1"}, "'b1', is not among CHORD_NODES a1, a2, a3, a4"),
        ({"CHORD_NODES": ""}, "CHORD_NODES is not set"),
        ({"CHORD_NODES": "a1 a2"}, "NAME=ADDRESS"),
        ({"CHORD_ROLLOUT_NODES": "4"}, "CHORD_ROLLOUT_NODES is 4, but of 4 nodes"),
        ({"CHORD_ROLLOUT_NODES": "-1"}, "CHORD_ROLLOUT_NODES must be a number"),
        ({"CHORD_PORT": "http"}, "CHORD_PORT must be a number, it is 'http'"),
        ({"CHORD_RANKS_PER_NODE": "all"}, "CHORD_RANKS_PER_NODE must be a number, it is 'all'"),
    ],
)
def test_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job("a1", **variables)


def test_a_job_on_one_machine_may_use_a_loopback_address() -> None:
    assert job("a1", nodes="a1=127.0.1.1").numeric_address() == "127.0.1.1"
    assert job("a1", nodes="a1=127.0.1.1 a2=127.0.1.2").numeric_address() == "127.0.1.1"


def test_a_loopback_address_of_the_own_host_name_is_not_used_between_machines() -> None:
    """/etc/hosts may map a machine's own name to a loopback address, which other machines cannot reach."""
    one = job("a1", nodes="a1=127.0.1.1 a2=192.0.2.7")
    try:
        address = one.numeric_address()
    except OSError as error:
        pytest.skip(f"this machine has no network: {error}")
    assert not ipaddress.ip_address(address).is_loopback
