"""Before a job's ranks start: is every node fit, are all alike, and do they reach each other?

One process a node. Each looks at itself (``cluster.report``), then all meet at a store on the first node, which proves
network and port. Each leaves a mark in the job's folder that the others must see, which proves the shared file system,
and reads its clock at the same moment. All compare the reports. Where nothing is wrong, as many processes a node as
there will be ranks run one all-reduce (``cluster.smoke``), over NCCL with GPUs, over gloo without.

Every node exits 0, ``REFUSED`` or ``EXIT_CODE``; what is wrong is recorded as a failure of the job.
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

from megatron_chord.cluster.job import Job, job_of
from megatron_chord.cluster.node_report import Report, faults, look
from megatron_chord.cluster.outcome import described, record_failure, tail
from megatron_chord.cluster.ranks import start_ranks
from megatron_chord.network import listener

EXIT_CODE = 78
"""EX_CONFIG of sysexits.h: these nodes cannot run this job."""
REFUSED = 2
"""Settings, model or data that will not do on any node; as of ``megatron-chord train``."""
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
        where = f"{job.head.address}:{job.port + 1}"
        return _fail(job, EXIT_CODE, [f"{job.name} could not meet the others at {where}: {error}"])
    if report.refusal and {other.refusal for other in reports} == {report.refusal}:
        return _fail(job, REFUSED, [report.refusal]) if job.is_head else REFUSED
    found = faults(reports)
    if found:
        return _fail(job, EXIT_CODE, found) if job.is_head else EXIT_CODE
    broken = _smoke(job) if job.trains else []
    return _fail(job, EXIT_CODE, broken) if broken else 0


def _fail(job: Job, code: int, lines: Sequence[str]) -> int:
    record_failure(job.folder, f"preflight-{job.name}", code, "\n".join(["preflight", *lines]))
    return code


def _meet(job: Job, report: Report) -> list[Report]:
    """Exchange reports over a store on the first node; all of them, the same on every node."""
    store = dist.TCPStore(
        job.head.address,
        job.port + 1,
        is_master=job.is_head,
        timeout=datetime.timedelta(seconds=_MEETING_S),
        wait_for_workers=False,
        master_listen_fd=listener(job.numeric_address(), job.port + 1).detach() if job.is_head else None,
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
    # The store lives in the first node's process, which must be the last to leave.
    store.set(f"left/{job.name}", "1")
    if job.is_head:
        store.wait([f"left/{name}" for name in names])
    return reports


def _unseen(folder: Path, names: Sequence[str]) -> list[str]:
    """Nodes whose mark does not appear in time: NFS may show a new file late."""
    deadline = time.monotonic() + _SHARED_S
    while True:
        seen = {entry.name for entry in folder.iterdir()}
        missing = [name for name in names if name not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def _smoke(job: Job) -> list[str]:
    """One all-reduce over all ranks; what is to be said of a failure on this node."""
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
