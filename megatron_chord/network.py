"""Ports, addresses and network interfaces of this machine."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import random
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""
_BACKLOG = 1024
_FIRST_PORT = 10_000
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_EPHEMERAL_PORT = 32_768
_TRIES = 1000


def free_port(host: str = "127.0.0.1") -> int:
    """A port of ``host`` that no socket uses now, for a process that listens on it later.

    The port is below those that the kernel gives to outgoing connections (ip(7), ``ip_local_port_range``). Otherwise a
    connection of any process can take the port before the server listens on it. RuntimeError when no port is free.
    """
    draw = random.SystemRandom()  # forked processes share the state of a seeded generator
    for _ in range(_TRIES):
        port = draw.randrange(_FIRST_PORT, _first_ephemeral_port())
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
            else:
                return port
    raise RuntimeError(f"no free port on {host} between {_FIRST_PORT} and {_first_ephemeral_port() - 1}")


def _first_ephemeral_port() -> int:
    """The first port that the kernel gives to outgoing connections. 32768, Linux's default, where that is unknown."""
    try:
        first = int(_EPHEMERAL_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _DEFAULT_EPHEMERAL_PORT
    return first if first > 2 * _FIRST_PORT else _DEFAULT_EPHEMERAL_PORT


def address_towards(peer: str, port: int = 9) -> str:
    """This machine's IPv4 address on the way to ``peer``. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
    """Whether a numeric address is a loopback address."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The network interface that has the IPv4 ``address``, or None. Loopback's has all of 127.0.0.0/8."""
    wanted = "127.0.0.1" if is_loopback(address) else address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == wanted:
                return name
    return None


def listener(address: str, port: int) -> socket.socket:
    """A socket that listens on this machine's ``address`` only. torch's TCPStore would otherwise listen on all of
    them."""
    return socket.create_server((address, port), backlog=_BACKLOG)
