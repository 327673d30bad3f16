"""The rollout servers of one node: starts them, announces them to the trainer, replaces those that died or were given
up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_chord.cluster.job import Job
from megatron_chord.cluster.ranks import log_folder
from megatron_chord.config import RunConfig
from megatron_chord.methods.base import Method
from megatron_chord.rollout.registry import Announcement, Registry, ServerOrder, read_key
from megatron_chord.rollout.server import RolloutServer, start_server, stop_all
from megatron_chord.train.engine import server_settings
from megatron_chord.train.setup import needs_servers

_CHECK_S = 0.5
"""Seconds between two checks of a server and of the trainer's requests to replace it."""


def order_of(run: RunConfig, job: Job) -> ServerOrder:
    """The servers of a run on each node of its job that samples."""
    return ServerOrder(
        model=run.model.path,
        settings=server_settings(run),
        count=job.num_servers_here(run.rollout.tensor),
        start_s=run.timeouts.server_start_s,
        restarts=run.rollout.restarts,
    )


def count_servers(job: Job, run: RunConfig, method: Method) -> int:
    """Number of servers of the whole job; 0 if nothing is sampled or the run lists its own servers.

    Raises:
        ValueError: the servers do not fit on the nodes' GPUs.
    """
    if run.rollout.servers or not needs_servers(run, method):
        return 0
    return job.num_servers(run.rollout.tensor)


class ServerLost(RuntimeError):
    """A server did not start, or died too often. ``log`` is the file with its output."""

    def __init__(self, message: str, server: int, log: Path) -> None:
        super().__init__(message)
        self.server = server
        self.log = log


@dataclass
class _Slot:
    server: int
    """Index of the server in the whole job."""
    local: int
    life: int
    process: RolloutServer
    deadline: float
    announced: bool = False


class NodeServers:
    def __init__(self, job: Job, order: ServerOrder, *, say: Callable[[str], None]) -> None:
        """Start this node's servers. Main thread only."""
        self._job = job
        self._order = order
        self._say = say
        self._registry = Registry(job.folder)
        self._key = read_key(job.folder)
        self._address = job.numeric_address()
        self._next_check = 0.0
        self._slots: list[_Slot] = []
        first = job.first_server(order.count)
        for local in range(order.count):
            self._slots.append(self._start(first + local, local, life=0))

    def watch(self) -> None:
        """Announce servers that became ready and replace lost ones. Raises ServerLost if no restart is left."""
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _CHECK_S
        self._slots = [self._watched(slot) for slot in self._slots]

    def kill(self) -> None:
        """End all servers at once. A trainer that waits for an answer of theirs gets an error and need not wait."""
        for slot in self._slots:
            slot.process.kill()

    def stop(self) -> None:
        stop_all([slot.process for slot in self._slots])
        self._slots = []

    def _watched(self, slot: _Slot) -> _Slot:
        process, who = slot.process, f"rollout server {slot.server} on {self._job.name}"
        if process.exit_code is not None:
            how = f"{who} ended with code {process.exit_code}"
            if not slot.announced:
                raise ServerLost(f"{how} while starting", slot.server, process.log)
            if self._job.trains and self._job.gpus and not self._is_given_up(slot):
                # Do not restart it now: ranks may be training on its GPU and leave too little memory. The trainer will
                # give it up when it needs it.
                return slot
            return self._replaced(slot, how)
        if self._is_given_up(slot):
            return self._replaced(slot, f"the trainer gave {who} up")
        if slot.announced:
            return slot
        if process.ready():
            here = Announcement(url=process.url, node=self._job.name, life=slot.life)
            self._registry.announce(slot.server, here)
            slot.announced = True
            self._say(f"{who} is ready")
        elif time.monotonic() > slot.deadline:
            text = f"{who} was not ready after {self._order.start_s:.0f} s"
            raise ServerLost(text, slot.server, process.log)
        return slot

    def _is_given_up(self, slot: _Slot) -> bool:
        return self._registry.given_up(slot.server) >= slot.life

    def _replaced(self, slot: _Slot, why: str) -> _Slot:
        slot.process.stop()
        if slot.life >= self._order.restarts:
            text = f"{why}, and the {self._order.restarts} restarts that the settings allow are used up"
            raise ServerLost(text, slot.server, slot.process.log)
        self._say(f"{why}; starting a new one")
        return self._start(slot.server, slot.local, life=slot.life + 1)

    def _start(self, server: int, local: int, *, life: int) -> _Slot:
        order = self._order
        devices = self._job.server_devices(local, order.settings.tensor)
        settings = dataclasses.replace(order.settings, visible_devices=devices)
        log = log_folder(self._job) / f"rollout-{self._job.name}-server{server}-{life}.log"
        try:
            process = start_server(order.model, settings, log=log, host=self._address, key=self._key)
        except ValueError as error:
            raise ServerLost(str(error), server, log) from error
        deadline = time.monotonic() + order.start_s
        return _Slot(server=server, local=local, life=life, process=process, deadline=deadline)
