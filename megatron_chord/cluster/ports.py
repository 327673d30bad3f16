"""The two ports of a job on its first node: one for the store of the preflight, one for the rendezvous of the ranks.

Both are bound once, when the node's program starts. The programs that use them inherit the sockets. So no other process
can take a port between the preflight and the start of the ranks.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

from megatron_chord.cluster.job import Job

_VARIABLE = "MEGATRON_CHORD_PORTS"
"""Environment variable: the file descriptors of ``Ports.ranks`` and ``Ports.preflight``, separated by a comma."""


@dataclass(frozen=True)
class Ports:
    """Two sockets that listen on the first node's address. Used as a context manager, it closes them at the end."""

    ranks: socket.socket
    """The socket that listens on ``Job.port``, for the rendezvous of the ranks."""
    preflight: socket.socket
    """The socket that listens on the next port, for the store of the preflight."""

    def descriptors(self) -> tuple[int, int]:
        """The file descriptors that a program must inherit to call ``inherited_ports``."""
        return self.ranks.fileno(), self.preflight.fileno()

    def to_variable(self) -> dict[str, str]:
        """The environment variable that ``inherited_ports`` reads."""
        return {_VARIABLE: ",".join(map(str, self.descriptors()))}

    def __enter__(self) -> Ports:
        return self

    def __exit__(self, *error: object) -> None:
        self.ranks.close()
        self.preflight.close()


def hold_ports(job: Job) -> Ports:
    """Listen on both ports. Call it on the first node. Raises OSError if another process has one of them."""
    with contextlib.ExitStack() as opened:
        ranks = opened.enter_context(job.listener(job.port))
        preflight = opened.enter_context(job.listener(job.port + 1))
        opened.pop_all()
    return Ports(ranks, preflight)


def inherited_ports() -> Ports | None:
    """The sockets that the program which started this one holds; None if it holds none. Only for one call."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    ranks, preflight = (socket.socket(fileno=int(number)) for number in text.split(","))
    return Ports(ranks, preflight)
