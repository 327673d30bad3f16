"""Preflight checks before a job's ranks start: each node, the differences between nodes, and the network.

There is one process on each node. It first checks its own node (``cluster.node_report``). Then all connect to a store
on the first node, which tests the network and the port. Each writes a file into the job's folder that the others must
see, which tests the shared file system. All read their clocks at the same moment and compare the reports. If there is
no fault, each node starts as many processes as it will have ranks, and these run one all-reduce (``cluster.smoke``),
over NCCL with GPUs and over gloo without. They meet on the port that the ranks will use. So no node leaves before all
of these processes have ended; otherwise a rank could connect to one of them.

Every node exits with 0, ``REFUSED`` or ``EXIT_CODE``. Faults are recorded as failures of the job.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_chord.cluster.address import set_nccl_network
from megatron_chord.cluster.job import Job, job_of
from megatron_chord.cluster.node_report import Report, faults, look
from megatron_chord.cluster.outcome import described, record_failure, tail
from megatron_chord.cluster.ports import Ports, hold_ports, inherited_ports
from megatron_chord.cluster.ranks import start_ranks
from megatron_chord.network import host_and_port

EXIT_CODE = 78
"""Exit code if these nodes cannot run this job (EX_CONFIG of sysexits.h)."""
REFUSED = 2
"""Exit code if settings, model or data are not valid on any node; the same as that of ``megatron-chord train``."""
_ARRIVAL_S = 600.0
"""Maximum time between the starts of the first and the last node. One may have to unpack the image of its container,
and many may read Python's packages from a slow file system at the same time."""
_MEETING_S = 120.0
"""Maximum time that the nodes wait for each other later."""
_SIGTERM_S = 2.0
"""Seconds in which the SIGTERM of a preemption reaches all nodes and processes of a job."""
_SHARED_S = 60.0
_SMOKE_S = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.cluster.preflight", description=__doc__)
    parser.add_argument("config", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    job = job_of(os.environ, num_gpus=torch.cuda.device_count())
    ports = (inherited_ports() or hold_ports(job)) if job.is_head else None
    report = look(job, args.config, args.overrides)
    try:
        return _check(job, report, ports)
    except (RuntimeError, OSError) as error:
        where = host_and_port(job.head.address, job.port + 1)
        text = f"{job.name} could not connect to the other nodes at {where}: {error}"
        return fail_unless_preempted(job, EXIT_CODE, [text])


def _check(job: Job, report: Report, ports: Ports | None) -> int:
    """Check this node together with all others. Returns the exit code.

    Raises RuntimeError or OSError if the nodes cannot connect to each other.
    """
    meeting = _Meeting(job, ports)
    code = _judge(job, report, meeting.compare(report))
    if code == 0:
        set_nccl_network(os.environ, job.numeric_address())
        broken = _smoke(job, ports) if job.trains else []
        if broken:
            return fail_unless_preempted(job, EXIT_CODE, broken)  # and then srun ends the other nodes
        meeting.exchange("smoke", "done", _SMOKE_S + _MEETING_S)
    meeting.leave()
    return code


def fail(job: Job, code: int, lines: Sequence[str]) -> int:
    """Record a failure of the preflight on this node. Returns `code`."""
    record_failure(job.folder, f"preflight-{job.name}", code, "\n".join(["preflight", *lines]))
    return code


def fail_unless_preempted(job: Job, code: int, lines: Sequence[str]) -> int:
    """Record a failure as ``fail`` does, if it is not the consequence of a preemption.

    A preemption ends the processes of a job one after another. So others may fail before its SIGTERM ends them.
    """
    time.sleep(_SIGTERM_S)
    return fail(job, code, lines)


def _judge(job: Job, own: Report, reports: Sequence[Report]) -> int:
    """Compare the reports. Returns the exit code, which is the same on every node; the first node records why."""
    if job.is_head:
        print(_table(job, reports), flush=True)
    if own.refusal and {report.refusal for report in reports} == {own.refusal}:
        return fail(job, REFUSED, [own.refusal]) if job.is_head else REFUSED
    found = faults(reports)
    if found:
        return fail(job, EXIT_CODE, found) if job.is_head else EXIT_CODE
    return 0


class _Meeting:
    """What the nodes tell each other through a store, which is in the first node's process."""

    def __init__(self, job: Job, ports: Ports | None) -> None:
        """Connect to the store. Raises RuntimeError or OSError if that fails."""
        self._job = job
        self._names = [node.name for node in job.nodes]
        self._store = dist.TCPStore(
            job.head_address(),
            job.port + 1,
            is_master=job.is_head,
            timeout=datetime.timedelta(seconds=_ARRIVAL_S),
            wait_for_workers=False,
            master_listen_fd=ports.preflight.detach() if ports is not None else None,
        )

    def compare(self, report: Report) -> list[Report]:
        """Exchange reports, with a clock that all have read at the same moment. Returns all reports."""
        marks = self._job.folder / "preflight"
        marks.mkdir(exist_ok=True, parents=True)
        (marks / self._job.name).write_text("here\n")
        self.exchange("here", "1", _ARRIVAL_S)
        report = replace(report, clock=time.time())
        unseen = _unseen(marks, self._names)
        if unseen:
            text = f"does not see what {', '.join(unseen)} wrote in {marks} {_SHARED_S:.0f} s ago"
            report = replace(report, problems=(*report.problems, f"{text}: no shared file system?"))
        return [_parsed(text) for text in self.exchange("report", json.dumps(asdict(report)), _MEETING_S)]

    def exchange(self, name: str, value: str, timeout_s: float) -> list[str]:
        """Every node's value. Raises RuntimeError with the missing nodes if one does not come within ``timeout_s``."""
        self._store.set(f"{name}/{self._job.name}", value)
        self._wait_for(name, timeout_s)
        return [self._store.get(f"{name}/{node}").decode() for node in self._names]

    def leave(self) -> None:
        """End the meeting. The first node's process waits until all others have left, because it has the store."""
        self._store.set(f"left/{self._job.name}", "1")
        if self._job.is_head:
            self._wait_for("left", _MEETING_S)

    def _wait_for(self, name: str, timeout_s: float) -> None:
        keys = {node: f"{name}/{node}" for node in self._names}
        try:
            self._store.wait(list(keys.values()), datetime.timedelta(seconds=timeout_s))
        except dist.DistStoreError as error:
            missing = [node for node, key in keys.items() if not self._store.check([key])]
            if not missing:
                raise
            what = f"{', '.join(missing)} did not come within {timeout_s:g} s ({name!r})"
            raise RuntimeError(what) from error


def _unseen(folder: Path, names: Sequence[str]) -> list[str]:
    """Nodes whose file does not appear in time. NFS may show a new file with a delay."""
    deadline = time.monotonic() + _SHARED_S
    while True:
        seen = {entry.name for entry in folder.iterdir()}
        missing = [name for name in names if name not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def _smoke(job: Job, ports: Ports | None) -> list[str]:
    """Run one all-reduce over all ranks. Returns the lines that describe a failure on this node, if any."""
    ranks = start_ranks(
        job,
        ["-m", "megatron_chord.cluster.smoke"],
        name="smoke",
        environment={},
        meeting_point=ports.ranks if ports is not None else None,
    )
    deadline = time.monotonic() + _SMOKE_S
    while any(rank.status is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.status not in (None, 0) for rank in ranks):
            break
        time.sleep(0.05)
    failed = [(rank, rank.status) for rank in ranks if rank.status != 0]
    for rank in ranks:
        rank.end(time.monotonic())
    if not failed:
        return []
    rank, status = next((item for item in failed if item[1] is not None), failed[0])
    how = f"did not finish within {_SMOKE_S:.0f} s" if status is None else described(status)
    return [f"all-reduce: rank {rank.number} on {job.name} {how}. The end of {rank.log}:", *tail(rank.log)]


def _table(job: Job, reports: Sequence[Report]) -> str:
    lines = [f"preflight: {len(reports)} nodes, {job.world_size} ranks"]
    for report in reports:
        what = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        lines.append(f"  {report.node}: {report.gpu_text}; {what}")
    return "\n".join(lines)


def _parsed(text: str) -> Report:
    fields = json.loads(text)
    return Report(**fields | {"gpus": tuple(fields["gpus"]), "problems": tuple(fields["problems"])})


if __name__ == "__main__":
    sys.exit(main())
