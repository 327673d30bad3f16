"""The addresses on which processes listen, read from /proc as ``ss -ltnp`` does."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def addresses(pids: Iterable[int]) -> set[str]:
    """Return the IPv4 and IPv6 addresses of all TCP sockets on which the processes listen."""
    wanted: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # the process has ended
            for link in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):  # the file was closed meanwhile
                    wanted.add(os.readlink(link))
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in wanted:
                found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(text: str) -> str:
    """Decode an address. The kernel prints it as 32-bit words in this machine's byte order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words))
