"""A real Slurm on this machine: one controller, several node daemons with an address each, and GPUs in name only.

Every virtual node has its own loopback address (127.0.1.1, 127.0.1.2, ...). So a test can tell a listener on a node's
own address from one on all addresses.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from megatron_chord.network import held_port
from megatron_chord.processes import die_with_parent

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
GPUS_PER_NODE = 8
_START_S = 30.0

_SLURM_CONF = """
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SwitchType=switch/none
MpiDefault=none
ReturnToService=1
KillWait=10
SlurmdParameters=config_overrides
GresTypes=gpu
MailProg=/bin/true
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=n[0-{last}] Default=YES MaxTime=1-0 State=UP PreemptMode=OFF
PartitionName=spare Nodes=n[0-{last}] MaxTime=1-0 State=UP PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[0-{last}] MaxTime=1-0 State=UP PriorityTier=2 PreemptMode=OFF
"""
_NODE = (
    "NodeName=n{index} NodeHostname={host} NodeAddr={address} Port={port} CPUs=64 Sockets=2 CoresPerSocket=32 "
    "ThreadsPerCore=1 RealMemory=200000 Gres=gpu:h100:{gpus} State=UNKNOWN"
)


class Box:
    """A running cluster of nodes n0, n1, ..."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = nodes
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._ports = contextlib.ExitStack()
        """Holds the ports of the daemons, which bind to them seconds after they are chosen."""

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons. Raise RuntimeError with the controller's log if the nodes are not idle in time."""
        for name in ("run", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True)
        for index in range(self.nodes):
            (self.folder / "spool" / f"n{index}").mkdir()
        host = socket.gethostname().split(".")[0]
        ports = [self._ports.enter_context(held_port("")) for _ in range(1 + self.nodes)]
        nodes = [
            _NODE.format(index=i, host=host, address=address_of(i), port=ports[1 + i], gpus=GPUS_PER_NODE)
            for i in range(self.nodes)
        ]
        text = _SLURM_CONF.format(
            host=host,
            user=getpass.getuser(),
            port=ports[0],
            folder=self.folder,
            nodes="\n".join(nodes),
            last=self.nodes - 1,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[0-{self.nodes - 1}] Name=gpu Type=h100 File=/dev/tty[0-{GPUS_PER_NODE - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text("")
        self._daemon("slurmctld", "-D")
        for index in range(self.nodes):
            self._daemon("slurmd", "-D", "-N", f"n{index}")
        deadline = time.monotonic() + _START_S
        while self.output("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).count("n") < self.nodes:
            if time.monotonic() > deadline:
                log = self.folder / "log" / "slurmctld.log"
                raise RuntimeError(f"the nodes did not get ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Cancel what still runs, and end the daemons."""
        if self._daemons and self._daemons[0].poll() is None:
            self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        self._ports.close()

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until they have ended."""
        jobs = self.output("squeue", "-h", "-o", "%i", check=False).split()
        if jobs:
            self.run("scancel", *jobs, check=False)
        deadline = time.monotonic() + _START_S
        while self.output("squeue", "-h", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)

    def run(
        self, *command: str, check: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command, such as sbatch."""
        return subprocess.run(
            command,
            env=self.environment | (env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def output(self, *command: str, check: bool = True) -> str:
        return self.run(*command, check=check).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says of the job."""
        text = self.output("scontrol", "show", "job", "-o", job_id)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def slurmd(self, node: int) -> int:
        """Return the process of the node's daemon."""
        return self._daemons[1 + node].pid

    def _daemon(self, *command: str) -> None:
        output = (self.folder / "log" / "daemons.out").open("ab")
        self._daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(None),
            )
        )
        output.close()


def address_of(node: int) -> str:
    """Return the loopback address of virtual node ``node``."""
    return f"127.0.1.{node + 1}"


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]
