"""Servers of an evaluation are started once. After a failure those that are lost are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from megatron_chord.config_suite import ServerConfig
from megatron_chord.evaluation.servers import FleetServers, devices_of_servers
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.fleet import Fleet
from megatron_chord.rollout.server import ServerError


class RecordedFleet:
    """A fleet without servers. It records the calls, and its first wait for servers fails if ``fails``."""

    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[str] = []
        self._fails = fails

    def start(self) -> None:
        self.calls.append("start")

    def connect(self) -> Sequence[RolloutClient]:
        self.calls.append("connect")
        if self._fails:
            raise ServerError("not ready")
        return ["client"]  # type: ignore[list-item]

    def replace(self, *, everything: bool) -> Sequence[RolloutClient]:
        self.calls.append(f"replace everything={everything}")
        return ["client"]  # type: ignore[list-item]

    def close(self) -> None:
        self.calls.append("close")


def test_a_second_connection_replaces_what_is_lost() -> None:
    fleet = RecordedFleet()
    servers = FleetServers(cast(Fleet, fleet))
    assert [servers.connect(), servers.connect()] == [["client"]] * 2
    servers.close()
    assert fleet.calls == ["start", "connect", "replace everything=False", "close"]


def test_a_server_that_does_not_start_is_replaced() -> None:
    fleet = RecordedFleet(fails=True)
    servers = FleetServers(cast(Fleet, fleet))
    with pytest.raises(ServerError):
        servers.connect()
    assert servers.connect() == ["client"]
    assert fleet.calls == ["start", "connect", "replace everything=False"]


def test_servers_share_the_gpus() -> None:
    assert devices_of_servers(ServerConfig(), []) == [None]
    assert devices_of_servers(ServerConfig(), ["0", "1", "2"]) == ["0", "1", "2"]
    assert devices_of_servers(ServerConfig(tensor=2, count=1), ["4", "5", "6"]) == ["4,5"]
    with pytest.raises(ValueError, match=r"server.count 2 x server.tensor 2 does not fit on 3 GPUs"):
        devices_of_servers(ServerConfig(tensor=2, count=2), ["0", "1", "2"])
