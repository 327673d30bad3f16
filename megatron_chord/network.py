"""Ports, addresses and network interfaces of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""
_BACKLOG = 1024


def bound_socket(address: str) -> socket.socket:
    """A TCP socket with a port of its own on ``address``, for a process that inherits it and listens on it.

    No other socket can take the port while this one is open. Connections are refused until somebody listens on it.
    """
    own = socket.socket()
    try:
        own.bind((address, 0))
    except BaseException:
        own.close()
        raise
    return own


@contextlib.contextmanager
def held_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port of ``address`` for a program that opens its socket itself, with SO_REUSEADDR.

    While the context is open, the kernel gives the port to no other socket and to no connection, and only a program
    that names this port can bind to it (socket(7), SO_REUSEADDR). Use ``bound_socket`` or ``listener`` if the program
    can inherit a socket: then nobody else can.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 0))
        yield holder.getsockname()[1]


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
