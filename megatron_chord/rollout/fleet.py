"""The rollout servers of a run: its own, those of a Slurm job, or those that the user started.

Only the coordinator uses them. ``start`` returns while servers still load; ``connect`` waits for them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.registry import Announcement, Registry
from megatron_chord.rollout.server import RolloutServer, ServerError, stop_all

_POLL_S = 0.2


class Fleet(Protocol):
    def start(self) -> None: ...

    def connect(self) -> Sequence[RolloutClient]:
        """Wait for the servers and return their clients. Raises ServerError if one is not ready in time."""
        ...

    def replace(self, *, everything: bool) -> Sequence[RolloutClient]:
        """Replace the servers that are lost (or all of them) by new ones, and connect."""
        ...

    def close(self) -> None: ...


def _to_replace(clients: Sequence[RolloutClient], count: int, *, everything: bool) -> Sequence[int]:
    """The indices of the servers that do not answer; of all ``count`` servers if all answer, or if ``everything``."""
    lost = [index for index, client in enumerate(clients) if not client.health()]
    return range(count) if everything or not lost else lost


class OwnServers:
    """Servers on this machine, children of this process."""

    def __init__(
        self, starts: Sequence[Callable[[], RolloutServer]], *, timeout_s: float, silence_s: float
    ) -> None:
        """``starts``: one function for each server; it starts the server. ``silence_s``: as of ``RolloutClient``."""
        self._starts = starts
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._servers: list[RolloutServer] = []
        self._clients: list[RolloutClient] = []

    def start(self) -> None:
        for start in self._starts:
            self._servers.append(start())

    def connect(self) -> Sequence[RolloutClient]:
        self._close_clients()
        end = time.monotonic() + self._timeout_s
        for server in self._servers:
            server.wait_until_ready(max(0.0, end - time.monotonic()))
        self._clients = [
            RolloutClient(server.url, server.api_key, silence_s=self._silence_s) for server in self._servers
        ]
        return self._clients

    def replace(self, *, everything: bool) -> Sequence[RolloutClient]:
        """Replace the servers that do not answer. If all answer, replace all, because one of them is at fault."""
        lost = _to_replace(self._clients, len(self._servers), everything=everything)
        self._close_clients()
        stop_all([self._servers[index] for index in lost])
        for index in lost:
            self._servers[index] = self._starts[index]()
        return self.connect()

    def close(self) -> None:
        self._close_clients()
        stop_all(self._servers)

    def _close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients = []


class ListedServers:
    """Servers that the user started. The run never restarts them."""

    def __init__(self, urls: Sequence[str], key: str, *, silence_s: float) -> None:
        self._clients = [RolloutClient(url, key, silence_s=silence_s) for url in urls]

    def start(self) -> None:
        pass

    def connect(self) -> Sequence[RolloutClient]:
        return self._clients

    def replace(self, *, everything: bool) -> Sequence[RolloutClient]:
        raise ServerError(
            "the servers in rollout.servers were not started by this run, so it cannot replace them"
        )

    def close(self) -> None:
        for client in self._clients:
            client.close()


class JobServers:
    """Servers that the nodes of a Slurm job run and announce in its folder (``cluster.node``)."""

    def __init__(
        self,
        registry: Registry,
        count: int,
        *,
        key: str,
        timeout_s: float,
        silence_s: float,
        stop_wanted: Callable[[], bool],
    ) -> None:
        """``stop_wanted`` ends the wait for servers: the nodes of a job that stops start no new ones."""
        self._registry = registry
        self._count = count
        self._key = key
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self._stop_wanted = stop_wanted
        self._known: list[Announcement] = []
        self._clients: list[RolloutClient] = []

    def start(self) -> None:
        pass

    def connect(self) -> Sequence[RolloutClient]:
        self.close()
        self._known = self._await_all()
        self._clients = [
            RolloutClient(server.url, self._key, silence_s=self._silence_s) for server in self._known
        ]
        return self._clients

    def replace(self, *, everything: bool) -> Sequence[RolloutClient]:
        """Have the servers that do not answer replaced. If all answer, replace all, because one of them is at fault."""
        lost = _to_replace(self._clients, self._count, everything=everything)
        for index in lost:
            if self._known:
                self._registry.give_up(index, self._known[index].life)
        return self.connect()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._clients = []

    def _await_all(self) -> list[Announcement]:
        end = time.monotonic() + self._timeout_s
        while True:
            ready = [self._ready(index) for index in range(self._count)]
            missing = [index for index, server in enumerate(ready) if server is None]
            if not missing:
                return [server for server in ready if server is not None]
            if time.monotonic() > end:
                names = ", ".join(map(str, missing))
                raise ServerError(
                    f"of the job's {self._count} rollout servers, these were not ready after "
                    f"{self._timeout_s:.0f} s: {names}"
                )
            if self._stop_wanted():
                raise ServerError("a stop was requested while the job's rollout servers were not ready")
            time.sleep(_POLL_S)

    def _ready(self, index: int) -> Announcement | None:
        server = self._registry.announced(index)
        if server is None or server.life <= self._registry.given_up(index):
            return None
        # The announcement of a server that died a moment ago may still exist.
        with contextlib.closing(RolloutClient(server.url, self._key)) as client:
            return server if client.health() else None
