"""Name, ports, addresses and network interfaces of this machine."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_SIOCGIFCONF = 0x8912
"""Linux's request for the IPv4 addresses of all interfaces (netdevice(7))."""
_IFREQ = struct.Struct("16s4x4s16x")
"""An entry of the reply on 64-bit Linux: name of the interface, and of a sockaddr_in the address."""
_MAX_INTERFACES = 1024
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
"""A line for each IPv6 address: 32 hexadecimal digits, four numbers, the name of the interface."""
_BACKLOG = 1024


def bound_socket(address: str) -> socket.socket:
    """A TCP socket with a port of its own on ``address``, for a process that inherits it and listens on it.

    No other socket can take the port while this one is open. Connections are refused until somebody listens on it.
    """
    own = socket.socket(_family(address))
    try:
        own.bind((address, 0))
    except BaseException:
        own.close()
        raise
    return own


@contextlib.contextmanager
def held_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port of ``address`` ("": of all IPv4 addresses) for a program that opens its socket itself, with SO_REUSEADDR.

    While the context is open, the kernel gives the port to no other socket and to no connection, and only a program
    that names this port can bind to it (socket(7), SO_REUSEADDR). Use ``bound_socket`` or ``listener`` if the program
    can inherit a socket: then nobody else can.
    """
    with socket.socket(_family(address)) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 0))
        yield holder.getsockname()[1]


def node_name() -> str:
    """The name of this machine in messages; in a job, the name that Slurm uses."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def loopback() -> str:
    """The address of this machine for itself: 127.0.0.1, or ::1 where IPv4 is not configured."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError:
            return "::1"
    return "127.0.0.1"


def resolve(name: str) -> str:
    """The numeric address of a host: IPv4 if the host has one and this machine has a route to it, else IPv6.

    Raises OSError if the name is not known.
    """
    entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    found = sorted((str(entry[4][0]) for entry in entries), key=_family)
    return next((address for address in found if _source(address) is not None), found[0])


def address_towards(peer: str) -> str:
    """This machine's numeric address on the way to the host ``peer``. Nothing is sent. Raises OSError without a way."""
    address = resolve(peer)
    source = _source(address)
    if source is None:
        raise OSError(errno.ENETUNREACH, f"this machine has no route to {peer} ({address})")
    return source


def _source(address: str) -> str | None:
    """This machine's address on the way to a numeric one; None without a route to it."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def host_and_port(host: str, port: int) -> str:
    """``127.0.0.1:80`` or ``[::1]:80``, as in a URL."""
    return f"[{host}]:{port}" if _family(host) == socket.AF_INET6 else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """True if a numeric address is a loopback address."""
    return ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The network interface that has the numeric ``address``, or None. Loopback's has all of 127.0.0.0/8."""
    is_ipv4 = _family(address) == socket.AF_INET
    wanted = "127.0.0.1" if is_ipv4 and is_loopback(address) else address
    return next((name for name, own in _own_addresses() if own == wanted), None)


def address_in(network: str) -> str:
    """This machine's numeric address in a network: the name of an interface, or a range such as 10.1.0.0/16.

    IPv4 comes first. Link-local addresses of IPv6 do not count. Raises ValueError if there is none.
    """
    found = list(_own_addresses())
    with contextlib.suppress(ValueError):
        wanted = ipaddress.ip_network(network)
        found = [(network, own) for _, own in found if ipaddress.ip_address(own) in wanted]
    for name, own in found:
        if name == network and not (":" in own and ipaddress.ip_address(own).is_link_local):
            return own
    here = ", ".join(f"{name} {own}" for name, own in _own_addresses())
    raise ValueError(f"no address in the network {network}; this machine has {here}")


def _own_addresses() -> Iterator[tuple[str, str]]:
    """Interfaces of this machine with their numeric addresses, those of IPv4 first."""
    reply = array.array("B", bytes(_IFREQ.size * _MAX_INTERFACES))
    where, length = reply.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        written = fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, struct.pack("iP", length, where))
    for label, digits in _IFREQ.iter_unpack(reply[: struct.unpack("iP", written)[0]]):
        # A label such as eth0:1 names a further address of eth0.
        yield label.partition(b"\0")[0].decode().partition(":")[0], socket.inet_ntoa(digits)
    if _IPV6_ADDRESSES.exists():  # the kernel may have no IPv6
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, *_, name = line.split()
            yield name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))


def listener(address: str, port: int) -> socket.socket:
    """A socket that listens on this machine's numeric ``address`` only. torch's TCPStore would otherwise listen on all
    of them."""
    return socket.create_server((address, port), family=_family(address), backlog=_BACKLOG)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
