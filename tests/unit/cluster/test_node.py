"""What a node does with a SIGTERM. Whole jobs are in tests/slurm."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.node import STOP_FILE, _Node
from megatron_chord.cluster.sigterm import CANCELLED_FILE, PREEMPTED_FILE
from tests.support.tiny import tiny_run


def node_with_sigterm(folder: Path, killed: list[str]) -> Any:
    """A node whose servers only record that they are killed; SIGTERM came a second ago."""
    job = Job(
        folder=folder,
        nodes=(Node(name="n0", address="127.0.0.1"), Node(name="n1", address="127.0.0.1")),
        index=1,
        port=0,
        num_rollout_nodes=0,
        ranks_per_node=1,
        gpus=(),
        servers_per_node=None,
    )
    node = cast(Any, _Node(job, tiny_run(folder), [], num_servers=2, ports=None))
    node._servers = SimpleNamespace(kill=lambda: killed.append("servers"))
    node._sigterms.note(15, None)
    node._sigterms._first_at = time.monotonic() - 1
    return node


def test_every_node_kills_its_servers_in_a_preemption(tmp_path: Path) -> None:
    """Another node was first: it has written the job's file."""
    killed = list[str]()
    node = node_with_sigterm(tmp_path, killed)
    (tmp_path / PREEMPTED_FILE).touch()
    assert [node._must_end() for _ in range(3)] == [False] * 3
    assert killed == ["servers"], "once"
    assert (tmp_path / STOP_FILE).exists()


def test_a_cancelled_job_ends_at_once(tmp_path: Path) -> None:
    killed = list[str]()
    node = node_with_sigterm(tmp_path, killed)
    (tmp_path / CANCELLED_FILE).touch()
    assert node._must_end()
    assert killed == []
