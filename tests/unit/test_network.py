"""Addresses and interfaces agree with other sources of the kernel."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from megatron_chord.network import (
    address_towards,
    bound_socket,
    held_port,
    host_and_port,
    interface_of,
    is_loopback,
    listener,
    resolve,
)
from tests.support.ipv6 import can_leave_the_network
from tests.support.listening import addresses

IPV6 = pytest.param("::1", marks=pytest.mark.skipif(interface_of("::1") is None, reason="needs IPv6"))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.9", IPV6])
def test_loopback_addresses_are_on_the_loopback_interface(address: str) -> None:
    name = interface_of(address)
    flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)
    assert flags & 0x8, "IFF_LOOPBACK (netdevice(7))"
    assert is_loopback(address)


def test_an_address_of_another_machine_has_no_interface() -> None:
    assert interface_of("203.0.113.7") is None
    assert interface_of("2001:db8::7") is None


@pytest.mark.parametrize("address", ["127.0.0.1", IPV6])
def test_the_way_to_this_machine(address: str) -> None:
    assert resolve(address) == address_towards(address) == address
    url = urlsplit(f"http://{host_and_port(address, 80)}/health")
    assert (url.hostname, url.port) == (address, 80)


def test_a_name_without_an_address_is_an_error() -> None:
    with pytest.raises(OSError, match=r"not known|resolution"):
        resolve("no.such.host.invalid")


def test_a_listener_is_reached_at_its_address_alone() -> None:
    before = addresses([os.getpid()])
    with listener("127.0.0.5", 0) as meeting_point, socket.socket() as stranger:
        assert addresses([os.getpid()]) == before | {"127.0.0.5"}
        assert stranger.connect_ex(("127.0.0.1", meeting_point.getsockname()[1])) != 0


def thief(host: str, port: int) -> socket.socket:
    """Take the port as a server would that reuses addresses as far as the kernel allows."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        taken.bind((host, port))
        taken.listen()
    except BaseException:
        taken.close()
        raise
    return taken


@pytest.mark.parametrize("address", ["127.0.0.1", IPV6])
def test_nobody_takes_the_port_of_a_bound_socket_before_its_heir_listens(address: str) -> None:
    heir = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.listen(); s.accept()[0].send(b'heir')"
    with bound_socket(address) as own:
        place = own.getsockname()[:2]
        with socket.socket(own.family) as early:
            assert early.connect_ex(place) == errno.ECONNREFUSED
        descriptor = own.fileno()
        process = subprocess.Popen([sys.executable, "-c", heir, str(descriptor)], pass_fds=[descriptor])
    try:
        while True:
            with pytest.raises(OSError, match="Address already in use"):
                thief(*place)
            with socket.socket(own.family) as client:
                if client.connect_ex(place) == 0:
                    assert client.recv(10) == b"heir"
                    break
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_the_kernel_gives_a_held_port_to_nobody_else() -> None:
    with held_port() as port:
        with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
            plain.bind(("127.0.0.1", port))
        with thief("127.0.0.1", port) as meant, socket.create_connection(("127.0.0.1", port)) as client:
            assert meant.accept()[1] == client.getsockname()
    with listener("127.0.0.1", port):
        pass


ONLY_PORT = textwrap.dedent(
    """
    import socket, subprocess
    from pathlib import Path
    from megatron_chord.network import held_port, listener

    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000")
    peer = listener("127.0.0.1", 30000)

    def who_gets_it():
        for kind in ("plain", "reusing", "connection"):
            with socket.socket() as other:
                if kind == "reusing":
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    if kind == "connection":
                        other.connect(("127.0.0.1", 30000))
                    else:
                        other.bind(("127.0.0.1", 0))
                    yield kind
                except OSError:
                    pass

    with held_port() as port:
        assert port == 40000
        print(*who_gets_it(), end=", ")
    print(*who_gets_it())
    """
)


@pytest.mark.skipif(not can_leave_the_network(), reason="needs a network namespace of its own")
def test_the_kernel_does_not_give_a_held_port_although_it_has_no_other() -> None:
    command = ["unshare", "--net", sys.executable, "-c", ONLY_PORT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == ", plain reusing connection", done.stderr


SEVERAL_ADDRESSES = textwrap.dedent(
    """
    import subprocess
    from megatron_chord.network import address_in, interface_of

    def ip(command):
        subprocess.run(["ip", *command.split()], check=True)

    ip("link add slow0 type veth peer name fast0")
    ip("address add 10.1.0.1/16 dev slow0")
    ip("address add 10.2.0.1/16 dev fast0")
    ip("address add 10.3.0.1/16 dev fast0")
    ip("address add fd77::1/64 dev fast0 nodad")
    for name in ("slow0", "fast0"):
        ip(f"link set {name} up")
    print(*map(address_in, ("slow0", "fast0", "10.3.0.0/16", "fd77::/64")))
    print(*map(interface_of, ("10.1.0.1", "10.2.0.1", "10.3.0.1", "fd77::1")))
    ip("address flush dev slow0 scope global")
    ip("link set slow0 down")
    for network in ("slow0", "10.4.0.0/16", "no0"):
        try:
            address_in(network)
        except ValueError as error:
            print(str(error).partition(";")[0])
    """
)


@pytest.mark.skipif(not can_leave_the_network(), reason="needs a network namespace of its own")
def test_a_machine_with_several_networks() -> None:
    command = ["unshare", "--net", sys.executable, "-c", SEVERAL_ADDRESSES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "10.1.0.1 10.2.0.1 10.3.0.1 fd77::1",
        "slow0 fast0 fast0 fast0",
        "no address in the network slow0",
        "no address in the network 10.4.0.0/16",
        "no address in the network no0",
    ], done.stderr
