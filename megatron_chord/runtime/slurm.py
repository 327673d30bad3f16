"""Translates Slurm's variables of a task to those of torch, for ``srun --ntasks-per-node=N megatron-chord train ...``.

It is for interactive use inside an allocation. Jobs of ``slurm/`` start their ranks through ``cluster.node``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_PORT = 10_000
_NUM_PORTS = 20_000
"""Number of ports to choose from. They are below the ports that Linux assigns automatically (32768 and up)."""


def rank_of_task(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and so on for a task of a step with several tasks; empty for any other process.

    Existing values of ``MASTER_ADDR`` and ``MASTER_PORT`` are kept.
    """
    count = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1:
        return {}
    ours = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port_of_step(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))),
    }
    return ours | {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}


def first_host(node_list: str) -> str:
    """The first name of a Slurm node list: ``gpu[03-05,9],x1`` -> ``gpu03``. Raises ValueError if there is none."""
    match = re.match(r"([\w.-]+)(?:\[(\d+)[^\]]*\]([\w.-]*))?", node_list)
    if match is None:
        raise ValueError(f"no host name in the node list {node_list!r}")
    return "".join(part or "" for part in match.groups())


def port_of_step(job: int, step: int) -> int:
    """A port for rank 0 that other jobs and steps of the same user are unlikely to use."""
    return _FIRST_PORT + (job * 17 + step) % _NUM_PORTS
