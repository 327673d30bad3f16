"""The rollout servers of one node: started, announced to the trainer, replaced when they die or are given up."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_chord.cluster.job import Job
from megatron_chord.cluster.ranks import log_folder
from megatron_chord.config import RunConfig
from megatron_chord.rollout.registry import Announcement, Registry, read_key
from megatron_chord.rollout.server import RolloutServer, start_server
from megatron_chord.train.engine import server_settings

_CHECK_S = 0.5
"""Between two looks at a server and at what the trainer wants of it."""


class PlaceError(RuntimeError):
    """A server that did not start, or died too often. ``log`` holds its output."""

    def __init__(self, message: str, server: int, log: Path) -> None:
        super().__init__(message)
        self.server = server
        self.log = log


@dataclass
class _Place:
    server: int
    """Job-wide index."""
    local: int
    life: int
    process: RolloutServer
    deadline: float
    announced: bool = False


class Places:
    def __init__(self, job: Job, run: RunConfig, *, say: Callable[[str], None]) -> None:
        """Start this node's servers. Main thread only."""
        self._job = job
        self._run = run
        self._say = say
        self._folder = job.folder
        self._registry = Registry(job.folder)
        self._key = read_key(job.folder)
        self._address = job.numeric_address()
        self._next_check = 0.0
        self._places: list[_Place] = []
        tensor = run.rollout.tensor
        for local in range(job.num_servers_here(tensor)):
            self._places.append(self._start(job.first_server(tensor) + local, local, life=0))

    def watch(self) -> None:
        """Announce servers that became ready and replace lost ones. PlaceError when one is lost for good."""
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _CHECK_S
        self._places = [self._watched(place) for place in self._places]

    def stop(self) -> None:
        for place in self._places:
            with contextlib.suppress(ProcessLookupError):
                if place.process.exit_code is None:
                    os.kill(
                        place.process.pid, signal.SIGTERM
                    )  # all at once, or each would wait for the one before
        for place in self._places:
            place.process.stop()
        self._places = []

    def _watched(self, place: _Place) -> _Place:
        process, who = place.process, f"rollout server {place.server} on {self._job.name}"
        if process.exit_code is not None:
            how = f"{who} ended with code {process.exit_code}"
            if not place.announced:
                raise PlaceError(f"{how} while starting", place.server, process.log)
            return self._replaced(place, how)
        if self._registry.given_up(place.server) >= place.life:
            return self._replaced(place, f"the trainer gave {who} up")
        if place.announced:
            return place
        if process.ready():
            here = Announcement(url=process.url, node=self._job.name, life=place.life)
            self._registry.announce(place.server, here)
            place.announced = True
            self._say(f"{who} is ready")
        elif time.monotonic() > place.deadline:
            text = f"{who} was not ready after {self._run.rollout.start_timeout_s:.0f} s"
            raise PlaceError(text, place.server, process.log)
        return place

    def _replaced(self, place: _Place, why: str) -> _Place:
        place.process.stop()
        if place.life >= self._run.rollout.restarts:
            text = f"{why}, once more than rollout.restarts allows ({self._run.rollout.restarts})"
            raise PlaceError(text, place.server, place.process.log)
        self._say(f"{why}; starting another")
        return self._start(place.server, place.local, life=place.life + 1)

    def _start(self, server: int, local: int, *, life: int) -> _Place:
        run = self._run
        devices = self._job.server_devices(local, run.rollout.tensor)
        settings = dataclasses.replace(server_settings(run), visible_devices=devices)
        log = log_folder(self._job) / f"rollout-{self._job.name}-server{server}-{life}.log"
        try:
            process = start_server(run.model.path, settings, log=log, host=self._address, key=self._key)
        except ValueError as error:
            raise PlaceError(str(error), server, log) from error
        deadline = time.monotonic() + run.rollout.start_timeout_s
        return _Place(server=server, local=local, life=life, process=process, deadline=deadline)
