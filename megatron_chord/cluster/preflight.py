"""Preflight checks before a job's ranks start: each node, the differences between nodes, and the network.

There is one process on each node. It first checks its own node (``cluster.node_report``). Then all connect to a store
on the first node, which tests the network and the port. Each writes a file into the job's folder that the others must
see, which tests the shared file system. All read their clocks at the same moment and compare the reports. If there is
no fault, each node starts as many processes as it will have ranks, and these run one all-reduce (``cluster.smoke``),
over NCCL with GPUs and over gloo without.

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
from megatron_chord.cluster.ranks import start_ranks
from megatron_chord.network import host_and_port

EXIT_CODE = 78
"""Exit code if these nodes cannot run this job (EX_CONFIG of sysexits.h)."""
REFUSED = 2
"""Exit code if settings, model or data are not valid on any node; the same as that of ``megatron-chord train``."""
_MEETING_S = 120.0
_SHARED_S = 60.0
_SMOKE_S = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.cluster.preflight", description=__doc__)
    parser.add_argument("config", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    job = job_of(os.environ, num_gpus=torch.cuda.device_count())
    report = look(job, args.config, args.overrides)
    try:
        reports = _meet(job, report)
    except (RuntimeError, OSError) as error:
        where = host_and_port(job.head.address, job.port + 1)
        return _fail(job, EXIT_CODE, [f"{job.name} could not meet the others at {where}: {error}"])
    if report.refusal and {other.refusal for other in reports} == {report.refusal}:
        return _fail(job, REFUSED, [report.refusal]) if job.is_head else REFUSED
    found = faults(reports)
    if found:
        return _fail(job, EXIT_CODE, found) if job.is_head else EXIT_CODE
    set_nccl_network(os.environ, job.numeric_address())
    broken = _smoke(job) if job.trains else []
    return _fail(job, EXIT_CODE, broken) if broken else 0


def _fail(job: Job, code: int, lines: Sequence[str]) -> int:
    record_failure(job.folder, f"preflight-{job.name}", code, "\n".join(["preflight", *lines]))
    return code


def _meet(job: Job, report: Report) -> list[Report]:
    """Exchange reports over a store on the first node. Returns all reports; the result is the same on every node."""
    store = dist.TCPStore(
        job.head_address(),
        job.port + 1,
        is_master=job.is_head,
        timeout=datetime.timedelta(seconds=_MEETING_S),
        wait_for_workers=False,
        master_listen_fd=job.listener(job.port + 1).detach() if job.is_head else None,
    )
    names = [node.name for node in job.nodes]
    marks = job.folder / "preflight"
    marks.mkdir(exist_ok=True, parents=True)
    (marks / job.name).write_text("here\n")
    store.set(f"here/{job.name}", "1")
    store.wait([f"here/{name}" for name in names], datetime.timedelta(seconds=_MEETING_S))
    report = replace(report, clock=time.time())
    unseen = _unseen(marks, names)
    if unseen:
        text = f"does not see what {', '.join(unseen)} wrote in {marks} {_SHARED_S:.0f} s ago: no shared file system?"
        report = replace(report, problems=(*report.problems, text))
    store.set(f"report/{job.name}", json.dumps(asdict(report)))
    reports = [_parsed(store.get(f"report/{name}")) for name in names]
    if job.is_head:
        print(_table(job, reports), flush=True)
    # The store is in the first node's process, so that process must be the last to leave.
    store.set(f"left/{job.name}", "1")
    if job.is_head:
        store.wait([f"left/{name}" for name in names])
    return reports


def _unseen(folder: Path, names: Sequence[str]) -> list[str]:
    """Nodes whose file does not appear in time. NFS may show a new file with a delay."""
    deadline = time.monotonic() + _SHARED_S
    while True:
        seen = {entry.name for entry in folder.iterdir()}
        missing = [name for name in names if name not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def _smoke(job: Job) -> list[str]:
    """Run one all-reduce over all ranks. Returns the lines that describe a failure on this node, if any."""
    ranks = start_ranks(job, ["-m", "megatron_chord.cluster.smoke"], name="smoke", environment={})
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


def _parsed(data: bytes) -> Report:
    fields = json.loads(data)
    return Report(**fields | {"gpus": tuple(fields["gpus"]), "problems": tuple(fields["problems"])})


if __name__ == "__main__":
    sys.exit(main())
