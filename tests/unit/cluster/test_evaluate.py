"""When the program of an evaluation job's node ends, and how. Whole jobs are in tests/slurm."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_chord.cluster.evaluate import _Node
from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.node import STOP_FILE
from megatron_chord.cluster.outcome import write_outcome
from megatron_chord.cluster.sigterm import CANCELLED_FILE, PREEMPTED_FILE


class Evaluation:
    """In place of the process: it runs until it gets a SIGTERM, or has the status ``status`` already."""

    def __init__(self, status: int | None = None) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.status = 143 if self.status is None else self.status


def node_of(folder: Path, *, index: int = 0, status: int | None = None) -> Any:
    names = ("n0", "n1")
    job = Job(
        folder=folder,
        nodes=tuple(Node(name=name, address="127.0.0.1") for name in names),
        index=index,
        port=0,
        num_rollout_nodes=0,
        ranks_per_node=1,
        gpus=(),
        servers_per_node=None,
    )
    node = cast(Any, _Node(job, []))
    node._servers = SimpleNamespace(watch=lambda: None)
    node._evaluation = Evaluation(status) if index == 0 else None
    return node


def get_sigterm(node: Any) -> None:
    """A second ago."""
    node._sigterms.note(15, None)
    node._sigterms._first_at = time.monotonic() - 1


def outcome(folder: Path) -> str:
    return (folder / "outcome").read_text().strip()


@pytest.mark.parametrize(("status", "code"), [(0, "0"), (1, "1"), (2, "2"), (-9, "137")])
def test_the_code_of_the_evaluation_is_that_of_the_job(tmp_path: Path, status: int, code: str) -> None:
    assert node_of(tmp_path, status=status)._watch() == 0
    assert outcome(tmp_path) == code


def test_a_stop_ends_the_evaluation_and_sends_the_job_back_to_the_queue(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    assert node._watch() is None
    (tmp_path / STOP_FILE).touch()
    assert node._watch() == 0
    assert outcome(tmp_path) == "75"


def test_an_evaluation_that_is_complete_at_the_stop_is_complete(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    assert node_of(tmp_path, status=0)._watch() == 0
    assert outcome(tmp_path) == "0"


def test_a_preemption_is_a_stop(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    get_sigterm(node)
    assert node._watch() == 0
    assert outcome(tmp_path) == "75"
    assert (tmp_path / PREEMPTED_FILE).exists()


def test_a_cancelled_job_ends_at_once(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    (tmp_path / CANCELLED_FILE).touch()
    get_sigterm(node)
    assert node._watch() == 143
    assert not (tmp_path / "outcome").exists()


def test_slurm_ends_the_evaluation_before_it_is_known_why(tmp_path: Path) -> None:
    """The SIGTERM has reached both processes. The batch script may still say that the job is cancelled."""
    node = node_of(tmp_path, status=143)
    node._sigterms.note(15, None)
    node._sigterms._first_at = time.monotonic() + 1000
    assert node._watch() is None
    get_sigterm(node)
    assert node._watch() == 143, "it is the second one"


def test_other_nodes_wait_for_the_first(tmp_path: Path) -> None:
    node = node_of(tmp_path, index=1)
    assert node._watch() is None
    write_outcome(tmp_path, 1)
    assert node._watch() == 0
