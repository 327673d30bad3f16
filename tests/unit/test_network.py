"""Addresses and interfaces agree with other sources of the kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_chord.network import address_towards, free_port, interface_of, is_loopback, listener
from tests.support.listening import addresses


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9"])
def test_all_of_127_is_on_the_loopback_interface(address: str) -> None:
    name = interface_of(address)
    flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)
    assert flags & 0x8, "IFF_LOOPBACK (netdevice(7))"
    assert is_loopback(address)


def test_an_address_of_another_machine_has_no_interface() -> None:
    assert interface_of("203.0.113.7") is None
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_a_listener_is_reached_at_its_address_alone() -> None:
    before = addresses([os.getpid()])
    with listener("127.0.0.5", 0) as meeting_point, socket.socket() as stranger:
        assert addresses([os.getpid()]) == before | {"127.0.0.5"}
        assert stranger.connect_ex(("127.0.0.1", meeting_point.getsockname()[1])) != 0


def test_no_outgoing_connection_can_take_a_free_port() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [free_port() for _ in range(200)]
    assert not [port for port in ports if first <= port <= last]
    assert len(set(ports)) > 150, "each call draws anew"
    with listener("127.0.0.1", free_port()) as taken, socket.socket() as other:
        assert other.connect_ex(taken.getsockname()) == 0
