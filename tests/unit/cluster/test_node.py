"""What a node does with a SIGTERM and with a frozen rank. Whole jobs are in tests/slurm."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.node import CHECKPOINT_FILE, LATEST, STOP_FILE, _Node
from megatron_chord.cluster.outcome import record_end
from megatron_chord.cluster.sigterm import CANCELLED_FILE, PREEMPTED_FILE
from megatron_chord.runtime import heartbeat
from megatron_chord.train import checkpoint
from megatron_chord.train.folder import CHECKPOINTS
from tests.support.tiny import tiny_run


def node_with_sigterm(folder: Path, killed: list[str], *, index: int = 1) -> Any:
    """A node whose servers only record that they are killed; SIGTERM came a second ago."""
    job = Job(
        folder=folder,
        nodes=(Node(name="n0", address="127.0.0.1"), Node(name="n1", address="127.0.0.1")),
        index=index,
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


def test_the_batch_script_learns_at_which_checkpoint_a_rank_froze(tmp_path: Path) -> None:
    assert LATEST == checkpoint.LATEST
    node = node_with_sigterm(tmp_path, [])
    log = tmp_path / "log"
    log.touch()
    node._sigterms = ()
    node._ranks = [SimpleNamespace(number=1, status=heartbeat.EXIT_CODE, log=log, complete_log=lambda: None)]
    file = tmp_path / CHECKPOINT_FILE
    assert node._watch_ranks() == heartbeat.EXIT_CODE
    assert file.read_text() == "none\n"
    latest = node._run.output / CHECKPOINTS / LATEST
    latest.parent.mkdir(parents=True)
    latest.write_text("step-000020\n")
    assert node._watch_ranks() == heartbeat.EXIT_CODE
    assert file.read_text() == "step-000020\n"
    file.unlink()
    node._ranks[0].status = 1
    assert node._watch_ranks() == 1
    assert not file.exists()


def test_a_rank_that_fails_after_the_end_of_the_run_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run has stopped with a checkpoint, and rank 1 crashes when its process ends."""
    node = node_with_sigterm(tmp_path, [], index=0)
    node._sigterms = ()
    log = tmp_path / "log"
    log.touch()
    node._ranks = [
        SimpleNamespace(number=number, status=status, log=log, complete_log=lambda: None)
        for number, status in ((0, None), (1, -11))
    ]
    monkeypatch.setenv("CHORD_JOB", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    record_end(75)
    assert node._watch_ranks() == 139, "only rank 0 knows"
    monkeypatch.setenv("RANK", "0")
    record_end(75)
    assert node._watch_ranks() is None
    node._ranks[0].status = 75
    assert node._watch_ranks() == 0
    assert (tmp_path / "outcome").read_text() == "75\n"
    assert "warning: after the end of the run, rank 1 was killed by SIGSEGV" in capsys.readouterr().out
