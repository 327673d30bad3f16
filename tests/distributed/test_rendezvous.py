"""Ranks listen on the addresses that lead to MASTER_ADDR, and on no other."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megatron_chord.network import address_towards, interface_of, is_loopback
from megatron_chord.runtime.rendezvous import meet
from tests.support.listening import addresses
from tests.support.ranks import run_ranks


def listened_on(master: str) -> set[str]:
    os.environ["MASTER_ADDR"] = master
    meet("gloo", timeout_s=240)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()
    found = addresses([os.getpid()])
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(("master", "world_size"), [("localhost", 2), ("unused", 1)])
def test_on_one_machine_everything_is_on_loopback(master: str, world_size: int) -> None:
    assert run_ranks(listened_on, world_size, master) == [{"127.0.0.1"}] * world_size


@pytest.mark.skipif(interface_of("::1") is None, reason="needs IPv6")
def test_the_store_is_on_the_ipv6_address_that_is_given() -> None:
    """gloo listens on the IPv4 address of an interface that has both."""
    first, second = run_ranks(listened_on, 2, "::1")
    assert first == second | {"::1"}
    assert second <= {"127.0.0.1", "::1"}


def test_across_machines_ranks_listen_on_the_addresses_that_the_others_reach() -> None:
    try:
        own = address_towards("203.0.113.7")
    except OSError:
        pytest.skip("this machine has no network")
    if is_loopback(own):
        pytest.skip("this machine has no network")
    assert run_ranks(listened_on, 2, own) == [{own}] * 2


def refusal(master: str, local: str) -> str:
    os.environ |= {"MASTER_ADDR": master, "LOCAL_WORLD_SIZE": local, "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="MASTER_ADDR") as caught:
        meet("gloo", timeout_s=5)
    return str(caught.value)


@pytest.mark.parametrize(
    ("master", "local", "reason"),
    [
        (
            "localhost",
            "1",
            "MASTER_ADDR localhost is 127.0.0.1 on rank 0's machine, where 1 of the 2 ranks run",
        ),
        ("203.0.113.7", "2", "rank 0 cannot listen on MASTER_ADDR 203.0.113.7"),
        ("no.such.host.invalid", "2", "MASTER_ADDR no.such.host.invalid cannot be resolved"),
    ],
)
def test_an_address_that_will_not_do(master: str, local: str, reason: str) -> None:
    assert reason in run_ranks(refusal, 1, master, local)[0]
