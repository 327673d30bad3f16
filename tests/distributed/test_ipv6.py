"""A job on two machines that have IPv6 addresses only, also on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import write_run
from tests.support.ipv6 import inside, missing, two_machines

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ADDRESSES = """
import json, os
from megatron_chord.cluster.job import job_of
from megatron_chord.network import address_towards, interface_of, loopback, resolve
job = job_of(os.environ, num_gpus=0)
print(json.dumps({
    "loopback": [loopback(), resolve("localhost"), interface_of("::1"), interface_of("127.0.0.1")],
    "peer": [resolve("node1"), address_towards("node1"), interface_of(address_towards("node1"))],
    "own": job.numeric_address(),
}))
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[str, str]]:
    with two_machines() as names:
        yield names


def environment(job: Path, node: int) -> dict[str, str]:
    """The variables that the batch script and Slurm give to a node."""
    return os.environ | {
        "CHORD_JOB": str(job),
        "CHORD_NODES": "n0=node0 n1=node1",
        "CHORD_PORT": "12000",
        "CHORD_RANKS_PER_NODE": "1",
        "SLURMD_NODENAME": f"n{node}",
        "OMP_NUM_THREADS": "1",
    }


def test_names_with_ipv6_addresses_only(machines: tuple[str, str], tmp_path: Path) -> None:
    command = inside(machines[0], [sys.executable, "-c", ADDRESSES])
    done = subprocess.run(command, env=environment(tmp_path, 0), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "loopback": ["::1", "::1", "lo", None],
        "peer": ["fd77::2", "fd77::1", "eth0"],
        "own": "fd77::1",
    }


def test_the_preflight_of_two_nodes(machines: tuple[str, str], tmp_path: Path) -> None:
    """Both listen, meet over a store, and make an all-reduce over gloo."""
    run, job = write_run(tmp_path, mu=1.0), tmp_path / "job"
    (job / "logs").mkdir(parents=True)
    (job / "failures").mkdir()
    command = [sys.executable, "-m", "megatron_chord.cluster.preflight", str(run)]
    nodes = [
        subprocess.Popen(
            inside(machine, command),
            env=environment(job, index),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, machine in enumerate(machines)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    failures = [path.read_text() for path in (job / "failures").iterdir()]
    assert [node.returncode for node in nodes] == [0, 0], (outputs, failures)
    assert "preflight: 2 nodes, 2 ranks" in outputs[0]


def test_ranks_of_one_machine(machines: tuple[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "megatron_chord.runtime.launcher",
        "2",
        "-m",
        "megatron_chord.cluster.smoke",
    ]
    done = subprocess.run(inside(machines[1], command), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
