"""Ports, addresses and network interfaces of this machine."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's IPv4 address (netdevice(7))."""
_BACKLOG = 1024


def free_port(host: str = "127.0.0.1") -> int:
    """A port of ``host`` that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def address_towards(peer: str, port: int = 9) -> str:
    """This machine's IPv4 address on the way to ``peer``. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
    """Of an address in numbers."""
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
    """A socket that listens on this machine's ``address`` alone, for torch's TCPStore, which else takes all of them."""
    return socket.create_server((address, port), backlog=_BACKLOG)
