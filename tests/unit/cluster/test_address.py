"""NCCL's network follows the node's address if the user chose the network of the job."""

from __future__ import annotations

import pytest

from megatron_chord.cluster.address import set_nccl_network
from megatron_chord.network import interface_of

LOOPBACK = {"NCCL_SOCKET_IFNAME": "=lo", "NCCL_SOCKET_FAMILY": "AF_INET"}


@pytest.mark.parametrize(
    ("address", "given", "added"),
    [
        ("127.0.0.1", {}, {}),
        ("127.0.0.1", {"CHORD_NETWORK": "127.0.0.0/8"}, LOOPBACK),
        (
            "127.0.0.1",
            {"CHORD_NETWORK": "lo", "NCCL_SOCKET_IFNAME": "ib"},
            LOOPBACK | {"NCCL_SOCKET_IFNAME": "ib"},
        ),
        pytest.param(
            "::1",
            {"CHORD_NETWORK": "lo"},
            LOOPBACK | {"NCCL_SOCKET_FAMILY": "AF_INET6"},
            marks=pytest.mark.skipif(interface_of("::1") is None, reason="needs IPv6"),
        ),
    ],
)
def test_nccl_network(address: str, given: dict[str, str], added: dict[str, str]) -> None:
    environment = dict(given)
    set_nccl_network(environment, address)
    assert environment == given | added
