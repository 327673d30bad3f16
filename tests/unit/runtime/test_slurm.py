"""A task's Slurm variables become torch's variables."""

from __future__ import annotations

import pytest

from megatron_chord.runtime.slurm import first_host, port_of_step, rank_of_task

TASK = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_a_task_of_a_step() -> None:
    assert rank_of_task(TASK) == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "27002",  # 10000 + 17 x 1000 + 2
    }


def test_an_address_of_the_users_own_comes_first() -> None:
    ours = rank_of_task(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert (ours["MASTER_ADDR"], ours["MASTER_PORT"]) == ("10.0.0.7", "4000")


@pytest.mark.parametrize(
    "environment",
    [{}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}],
    ids=["no Slurm", "one task", "a batch script"],
)
def test_other_processes_are_left_alone(environment: dict[str, str]) -> None:
    assert rank_of_task(environment) == {}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("n0", "n0"),
        ("n[0-3]", "n0"),
        ("gpu[03-05,9],x1", "gpu03"),
        ("a-b.c[12,14]-ib", "a-b.c12-ib"),
        ("x1,x2", "x1"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_no_host() -> None:
    with pytest.raises(ValueError, match="no host name"):
        first_host("[1-2]")


def test_ports_lie_below_those_that_linux_hands_out() -> None:
    ports = [port_of_step(job, step) for job in range(0, 10**6, 997) for step in (0, 1)]
    assert 10_000 <= min(ports) <= max(ports) < 32_768
