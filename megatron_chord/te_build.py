"""Checks whether this machine can build Transformer Engine's extension for PyTorch, and prepares the build.

    python -m megatron_chord.te_build --first    checks of compiler, memory and disk, before anything is installed
    python -m megatron_chord.te_build COMMAND    all checks, then COMMAND with the environment that the build needs

`make venv-gpu` does both. doctor shows the checks if Transformer Engine is missing. This module needs only the standard
library, because no package is installed at the first call.

The extension (transformer-engine-torch 2.11: setup.py, build_tools/) is C++ without CUDA code. NVIDIA's wheels contain
all of the headers, but setup.py does not find them:

* With a CUDA toolkit it searches only the toolkit, which has neither cuDNN's nor NCCL's headers.
* Without a toolkit it fails: it reads ``nvidia.__file__``, which is None, and looks for the runtime of CUDA 12.

So ``environment`` tells setup.py that the wheels are the toolkit. A toolkit of the machine is not used.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

GIB = 1 << 30
JOB_MEMORY = 3 * GIB
"""Memory of one compiler process. The largest of the 28 files (csrc/extensions/pybind.cpp) took 2.5 GiB with g++
12."""
DOWNLOAD_DISK = 6 * GIB
"""Disk space for temporary files of pip, which keeps its downloads until everything is installed."""
BUILD_DISK = 1 * GIB
"""Disk space for temporary files of the build."""
INSTALL_DISK = 16 * GIB
"""Disk space for the environment (9.3 GB) and the downloads, if both are on one disk."""
CUDA = "nvidia/cu13"
HEADERS = {
    "cuda_runtime_api.h": (f"{CUDA}/include", "nvidia-cuda-runtime"),
    "crt/host_defines.h": (f"{CUDA}/include", "nvidia-cuda-crt"),
    "cublas_v2.h": (f"{CUDA}/include", "nvidia-cublas"),
    "cusparse.h": (f"{CUDA}/include", "nvidia-cusparse"),
    "cusolverDn.h": (f"{CUDA}/include", "nvidia-cusolver"),
    "cudnn.h": ("nvidia/cudnn/include", "nvidia-cudnn-cu13"),
    "nccl.h": ("nvidia/nccl/include", "nvidia-nccl-cu13"),
}
"""For each header: its folder in site-packages, and the distribution that contains it."""
MODULES = ("setuptools", "wheel", "packaging")
"""Packages that setup.py imports, in addition to torch."""


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    fits: bool
    remedy: str
    """What to do if the check fails."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the operating system has for the build."""

    num_cores: int
    memory: int
    """Bytes of memory that processes can still use."""
    temporary: Path
    """Folder for temporary files."""
    free_temporary: int
    """Bytes."""
    variables: Mapping[str, str]
    """The environment variables. CXX, MAX_JOBS and PATH are read."""


def this_host() -> Host:
    folder = Path(tempfile.gettempdir())
    return Host(
        num_cores=len(os.sched_getaffinity(0)),
        memory=available_memory(),
        temporary=folder,
        free_temporary=shutil.disk_usage(folder).free,
        variables=dict(os.environ),
    )


def available_memory(
    meminfo: Path = Path("/proc/meminfo"),
    root: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes of memory that processes can still use: what is free on the machine, or in this process's control group or
    one above it, where that is less.

    A group is charged for pages of files that it read or wrote. Those that are not in use count as free, as in
    MemAvailable, because the kernel drops them when memory is needed.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    assert found is not None, f"{meminfo} has no line MemAvailable"
    free = [int(found[1]) << 10]
    groups = own.read_text() if own.is_file() else ""
    for kind, top in ((_GROUPS, root), (_GROUPS_V1, root / "memory")):
        named = re.search(kind.line, groups, re.MULTILINE)
        group = top / named[1] if named is not None else top
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                free += _free_in_group(folder, kind)
    return max(min(free), 0)


class _Groups(NamedTuple):
    """How a version of Linux's control groups names things."""

    line: str
    """Pattern of the line in /proc/self/cgroup with the process's group."""
    limit: str
    used: str
    unused: str
    """The counter in ``memory.stat``, for the group and those below it, of file pages that are not in use."""


_GROUPS = _Groups(r"^0::/(.*)$", "memory.max", "memory.current", "inactive_file")
_GROUPS_V1 = _Groups(
    r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)$",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def _free_in_group(group: Path, kind: _Groups) -> list[int]:
    """Bytes that the control group may still use; empty if it has no limit."""
    limit, used, counters = group / kind.limit, group / kind.used, group / "memory.stat"
    if not (limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit()):
        return []
    unused = re.search(
        rf"^{kind.unused} (\d+)$", counters.read_text() if counters.is_file() else "", re.MULTILINE
    )
    return [int(most) - int(used.read_text()) + (int(unused[1]) if unused is not None else 0)]


def num_jobs(host: Host) -> int:
    """How many compilers run at the same time: MAX_JOBS, or as many as cores and memory allow."""
    if wanted := host.variables.get("MAX_JOBS"):
        if not wanted.isdigit() or int(wanted) < 1:
            raise SystemExit(f"MAX_JOBS is {wanted!r}; it must be a number of compilers, 1 or more")
        return int(wanted)
    return max(1, min(host.num_cores, host.memory // JOB_MEMORY))


# The checks


def host_checks(host: Host, temporary: int = BUILD_DISK) -> list[Check]:
    """Checks of the compiler, of memory, and of ``temporary`` bytes of disk space for temporary files."""
    jobs = num_jobs(host)
    needed = jobs * JOB_MEMORY
    fitting = max(1, host.memory // JOB_MEMORY)
    memory = Check(
        "memory",
        f"{host.memory / GIB:.1f} GiB free for {jobs} compilers",
        host.memory >= needed,
        f"needs {JOB_MEMORY / GIB:.0f} GiB for each compiler: "
        + (f"MAX_JOBS={fitting} make venv-gpu" if jobs > fitting else "stop other programs"),
    )
    return [
        _compiler(host),
        memory,
        _disk("temporary files", host.temporary, host.free_temporary, temporary),
    ]


def install_disk(folder: Path) -> Check:
    """Check whether the environment fits on the disk of ``folder``."""
    return _disk("environment", folder, shutil.disk_usage(folder).free, INSTALL_DISK)


def package_checks(host: Host) -> list[Check]:
    """Checks of the packages that requirements/gpu.txt installs."""
    modules = [name for name in ("torch", *MODULES) if _version(name) is None]
    headers = [name for name, (folder, _) in HEADERS.items() if _find(f"{folder}/{name}") is None]
    brought_by = sorted({HEADERS[name][1] for name in headers})
    nvcc, ninja = _find(f"{CUDA}/bin/nvcc"), shutil.which("ninja", path=_path(host))
    install = "pip install --no-deps -r requirements/gpu.txt"
    return [
        Check("Python packages", _all_but(modules), not modules, f"{' '.join(modules)}: {install}"),
        Check("ninja", ninja or "-", ninja is not None, f"without it one compiler runs at a time: {install}"),
        Check("nvcc", str(nvcc or "-"), nvcc is not None, f"setup.py asks it for its version: {install}"),
        Check("headers", _all_but(headers), not headers, f"from {', '.join(brought_by)}: {install}"),
    ]


def checks(host: Host) -> list[Check]:
    return [*host_checks(host), *package_checks(host)]


def _compiler(host: Host) -> Check:
    """Check that the compiler can compile C++20, which torch 2.13 needs, with the headers of this Python."""
    name = host.variables.get("CXX") or "c++"
    found = shutil.which(name, path=host.variables.get("PATH"))
    remedy = f"apt-get install g++ python3-dev, or set CXX to a compiler (tried: {name})"
    if found is None:
        return Check("C++ compiler", "-", False, remedy)
    source = "#include <Python.h>\n#include <concepts>\nstatic_assert(std::same_as<int, int>);\n"
    command = [found, "-std=c++20", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c++", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return Check("C++ compiler", found, True, "")
    error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    if "Python.h" in error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        remedy = f"Python's headers are missing: apt-get install python{version}-dev"
    else:
        remedy = f"it must compile C++20 (g++ 10 or newer): {remedy}"
    return Check("C++ compiler", f"{found}: {error}", False, remedy)


def _disk(what: str, folder: Path, free: int, needed: int) -> Check:
    remedy = f"needs {needed / GIB:.0f} GiB: free some, or set " + (
        "TMPDIR to a folder on another disk"
        if what == "temporary files"
        else "VENV (make VENV=/other/disk venv-gpu)"
    )
    return Check(f"disk for {what}", f"{free / GIB:.1f} GiB free in {folder}", free >= needed, remedy)


def _all_but(missing: Iterable[str]) -> str:
    return "without " + ", ".join(missing) if missing else "all"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _find(relative: str) -> Path | None:
    """The path of a file or folder of an installed distribution."""
    return next((path for entry in sys.path if (path := Path(entry, relative)).exists()), None)


# The environment


def environment(host: Host) -> dict[str, str]:
    """Additional environment variables for pip. The folders of the wheels must exist (``package_checks``)."""
    folders = dict.fromkeys(folder for folder, _ in HEADERS.values())
    include = [str(found) for folder in folders if (found := _find(folder))]
    if own := host.variables.get("CPATH"):
        include.append(own)
    return {
        "PATH": _path(host),
        "CUDA_HOME": str(_find(CUDA)),
        "CPATH": os.pathsep.join(include),
        "MAX_JOBS": str(num_jobs(host)),
        "NVTE_FRAMEWORK": "pytorch",
        # Otherwise setup.py takes a file from GitHub, of which no hash is known.
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
    }


def _path(host: Host) -> str:
    """PATH with the programs of the environment, such as ninja, before all others."""
    scripts = sysconfig.get_path("scripts")
    return os.pathsep.join([scripts, host.variables["PATH"]]) if "PATH" in host.variables else scripts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.te_build", description=__doc__)
    parser.add_argument(
        "--first", action="store_true", help="check only what is needed before anything is installed"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="run when all checks pass")
    args = parser.parse_args(arguments)
    host = this_host()
    results = (
        [*host_checks(host, DOWNLOAD_DISK), install_disk(Path(sys.prefix))] if args.first else checks(host)
    )
    faults = [check for check in results if not check.fits]
    for check in results:
        print(f"  {'ok' if check.fits else 'NO':2}  {check.name}: {check.found}")
    if faults:
        print("Transformer Engine cannot be built here. Without FP8: make venv-gpu FP8=0", file=sys.stderr)
        for check in faults:
            print(f"  {check.name}: {check.remedy}", file=sys.stderr)
        return 1
    if args.command:
        os.environ.update(environment(host))
        sys.stdout.flush()
        os.execvp(args.command[0], args.command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
