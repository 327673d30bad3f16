"""The ranks of a node: rank 0 has its port before it is started."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.ranks import start_ranks
from megatron_chord.network import held_port


def job_of_two_ranks(folder: Path, port: int) -> Job:
    return Job(
        folder=folder,
        nodes=(Node(name="n0", address="127.0.0.1"),),
        index=0,
        port=port,
        num_rollout_nodes=0,
        ranks_per_node=2,
        gpus=(),
        servers_per_node=None,
    )


def test_nobody_takes_the_port_while_ranks_import_torch(tmp_path: Path) -> None:
    with held_port() as port:
        job = job_of_two_ranks(tmp_path, port)
        ranks = start_ranks(job, ["-m", "megatron_chord.cluster.smoke"], name="smoke", environment={})
        with pytest.raises(OSError, match="Address already in use"):
            socket.create_server(("127.0.0.1", port))
        for rank in ranks:
            rank.end(time.monotonic() + 120)
            rank.complete_log()
        assert [rank.status for rank in ranks] == [0, 0], [rank.log.read_text() for rank in ranks]


def test_a_port_in_use_is_named_before_any_rank_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        job = job_of_two_ranks(tmp_path, taken.getsockname()[1])
        reason = f"cannot listen on 127.0.0.1:{job.port}: Address already in use; set CHORD_PORT"
        with pytest.raises(OSError, match=reason):
            start_ranks(job, ["-m", "megatron_chord.cluster.smoke"], name="smoke", environment={})
