"""Machines that have IPv6 addresses only: network namespaces (ip-netns(8)), which need root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

_NAMES = Path("/etc/netns")
"""``ip netns exec`` shows a machine the files of its folder here in the place of those in /etc."""
_HOSTS = "::1 localhost\nfd77::1 node0\nfd77::2 node1\n"


@cache
def missing() -> str | None:
    """The reason why this machine cannot make others; None if it can. A container often lacks the right, also as
    root."""
    try:
        with two_machines():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs network namespaces with IPv6: {error}"


@cache
def can_leave_the_network() -> bool:
    """True if this process may start others in a network namespace of their own."""
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "set", "lo", "up"], check=False, capture_output=True
    )
    return tried.returncode == 0


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Two machines, joined by a cable. Their names node0 and node1 have the addresses fd77::1 and fd77::2.

    They have no IPv4 address, and ::1 is the only one of loopback. Yields the names of their namespaces.
    """
    first, second = names = (f"chord-{os.getpid()}-0", f"chord-{os.getpid()}-1")
    try:
        for name in names:
            _ip("netns", "add", name)
            (_NAMES / name).mkdir(parents=True)
            (_NAMES / name / "hosts").write_text(_HOSTS)
        _ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for index, name in enumerate(names):
            _ip("-n", name, "address", "add", f"fd77::{index + 1}/64", "dev", "eth0", "nodad")
            for interface in ("lo", "eth0"):
                _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "address", "del", "127.0.0.1/8", "dev", "lo")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(_NAMES / name, ignore_errors=True)


def inside(machine: str, command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` on the machine."""
    return ["ip", "netns", "exec", machine, *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
