"""The ranks of a node, and the ports of a job: they are held from the start of the node's program."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_chord.cluster.job import Job, Node
from megatron_chord.cluster.ports import hold_ports, inherited_ports
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


@contextlib.contextmanager
def held_pair() -> Iterator[int]:
    """The first of two ports in a row that no other program takes meanwhile."""
    while True:
        with held_port() as port, socket.socket() as after:
            after.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                after.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            yield port
            return


def test_nobody_takes_the_port_while_ranks_import_torch(tmp_path: Path) -> None:
    with held_pair() as port:
        job = job_of_two_ranks(tmp_path, port)
        with hold_ports(job) as ports:
            ranks = start_ranks(
                job,
                ["-m", "megatron_chord.cluster.smoke"],
                name="smoke",
                environment={},
                meeting_point=ports.ranks,
            )
        with pytest.raises(OSError, match="Address already in use"):
            socket.create_server(("127.0.0.1", port))
        for rank in ranks:
            rank.end(time.monotonic() + 120)
            rank.complete_log()
        assert [rank.status for rank in ranks] == [0, 0], [rank.log.read_text() for rank in ranks]


@pytest.mark.parametrize("place", [0, 1])
def test_a_port_in_use_is_named_and_the_other_is_free_again(tmp_path: Path, place: int) -> None:
    with held_pair() as port:
        taken, other = port + place, port + 1 - place
        reason = f"cannot listen on 127.0.0.1:{taken}: Address already in use; set CHORD_PORT"
        with (
            socket.create_server(("127.0.0.1", taken)),
            pytest.raises(OSError, match=reason),
        ):
            hold_ports(job_of_two_ranks(tmp_path, port))
        socket.create_server(("127.0.0.1", other)).close()


COPYING = """
import sys
from pathlib import Path
from megatron_chord.cluster.ranks import _copy
_copy(sys.stdin.buffer, Path("/dev/full"))
"""


def test_a_rank_whose_log_cannot_be_written_goes_on() -> None:
    """Its output still arrives, and says once what the log lacks."""
    lines = "".join(f"step {number}\n" for number in range(20_000))
    copied = subprocess.run(
        [sys.executable, "-c", COPYING], input=lines, capture_output=True, text=True, check=False
    )
    said = "/dev/full lacks lines: No space left on device\n"
    assert copied.stdout.count(said) == 1
    assert copied.stdout.replace(said, "") == lines
    assert (copied.returncode, copied.stderr) == (0, "")


INHERITING = """
from megatron_chord.cluster.ports import inherited_ports
ports = inherited_ports()
print(ports.ranks.getsockname()[1], ports.preflight.getsockname()[1], inherited_ports())
"""


def test_another_program_inherits_both_sockets(tmp_path: Path) -> None:
    assert inherited_ports() is None
    with held_pair() as port, hold_ports(job_of_two_ranks(tmp_path, port)) as ports:
        done = subprocess.run(
            [sys.executable, "-c", INHERITING],
            env=os.environ | ports.to_variable(),
            pass_fds=ports.descriptors(),
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.split() == [str(port), str(port + 1), "None"]
