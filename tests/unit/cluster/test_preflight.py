"""What one node of a preflight does when others fail. Whole preflights are in tests/slurm and tests/distributed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from megatron_chord.cluster import preflight
from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.ports import Ports
from megatron_chord.network import listener


def job_in(folder: Path, index: int, port: int = 10000) -> Job:
    """A job of the nodes n0 and n1, which are this machine."""
    return Job(
        folder=folder,
        nodes=(Node(name="n0", address="127.0.0.1"), Node(name="n1", address="127.0.0.1")),
        index=index,
        port=port,
        num_rollout_nodes=0,
        ranks_per_node=1,
        gpus=(),
        servers_per_node=None,
    )


class Ended(BaseException):
    """In place of the SIGTERM that ends the process."""


@pytest.mark.parametrize("fails", ["the meeting", "the all-reduce"])
def test_a_preemption_is_no_failure_of_the_preflight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Another node was ended first. This node fails, and then gets the SIGTERM, too."""

    def end(seconds: float) -> NoReturn:
        raise Ended

    def compare(report: Any) -> list[Any]:
        if fails == "the meeting":
            raise RuntimeError("Connection reset by peer")
        return []

    job = job_in(tmp_path, 1)
    monkeypatch.setattr(preflight, "job_of", lambda *args, **names: job)
    monkeypatch.setattr(preflight, "look", lambda *args: None)
    monkeypatch.setattr(preflight, "_Meeting", lambda *args: SimpleNamespace(compare=compare))
    monkeypatch.setattr(preflight, "_judge", lambda *args: 0)
    monkeypatch.setattr(preflight, "_smoke", lambda *args: ["all-reduce: rank 1 on n1 exited with code 1"])
    arguments = [str(tmp_path / "run.yaml")]
    with monkeypatch.context() as preempted:
        preempted.setattr(preflight.time, "sleep", end)
        with pytest.raises(Ended):
            preflight.main(arguments)
    assert not (tmp_path / "failures").exists()
    monkeypatch.setattr(preflight, "_SIGTERM_S", 0.0)
    assert preflight.main(arguments) == preflight.EXIT_CODE
    assert len(list((tmp_path / "failures").iterdir())) == 1


def test_a_node_that_starts_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later the nodes wait less, and the message names the one that does not come."""
    monkeypatch.setattr(preflight, "_MEETING_S", 0.5)
    ports = Ports(ranks=listener("127.0.0.1", 0), preflight=listener("127.0.0.1", 0))
    port = ports.preflight.getsockname()[1] - 1
    first, second = job_in(tmp_path, 0, port), job_in(tmp_path, 1, port)
    with ports:
        meeting = preflight._Meeting(first, ports)
    with ThreadPoolExecutor(1) as pool:
        here = pool.submit(meeting.exchange, "here", "0", preflight._ARRIVAL_S)
        time.sleep(1)
        other = preflight._Meeting(second, None)
        assert other.exchange("here", "1", preflight._ARRIVAL_S) == here.result() == ["0", "1"]
    with pytest.raises(RuntimeError, match=r"^n1 did not come within 0\.5 s \('report'\)$"):
        meeting.exchange("report", "0", 0.5)
    with pytest.raises(RuntimeError, match=r"^n0 did not come within 0\.5 s \('smoke'\)$"):
        other.exchange("smoke", "1", 0.5)
