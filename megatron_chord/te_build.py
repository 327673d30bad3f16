"""What the build of Transformer Engine's extension for PyTorch needs of this machine, and the environment for it.

    python -m megatron_chord.te_build --first    before anything is installed: compiler, memory, disk
    python -m megatron_chord.te_build COMMAND    all checks, then COMMAND in the environment that the build needs

`make venv-gpu` does both; doctor shows the checks where Transformer Engine is missing. Only the standard library is
needed, because the first call comes before all packages.

The extension (transformer-engine-torch 2.11: setup.py, build_tools/) is C++ without CUDA code. NVIDIA's wheels hold
every header, but its setup.py does not find them by itself:

* With a CUDA toolkit it searches only the toolkit, which has neither cuDNN's nor NCCL's headers.
* Without one it stops: it reads ``nvidia.__file__``, which is None, and asks for CUDA 12's runtime by name.

So ``environment`` names the wheels as the toolkit. A toolkit of the machine is not used.
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

GIB = 1 << 30
JOB_MEMORY = 3 * GIB
"""For one compiler. The largest of the 28 files (csrc/extensions/pybind.cpp) took 2.5 GiB with g++ 12."""
DOWNLOAD_DISK = 6 * GIB
"""For temporary files: pip keeps what it downloads there until it has installed all of it."""
BUILD_DISK = 1 * GIB
"""For temporary files of the build."""
INSTALL_DISK = 16 * GIB
"""For the environment, 9.3 GB, and for the downloads where both are on one disk."""
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
"""Header -> its folder in site-packages, and the distribution that brings it."""
MODULES = ("setuptools", "wheel", "packaging")
"""Imported by setup.py, beside torch."""


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    fits: bool
    remedy: str
    """What to do where it does not fit."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the operating system offers to the build."""

    num_cores: int
    memory: int
    """Bytes that are free for processes."""
    temporary: Path
    """Folder for temporary files."""
    free_temporary: int
    """Bytes."""
    variables: Mapping[str, str]
    """The environment: CXX, MAX_JOBS and PATH are read."""


def this_host() -> Host:
    folder = Path(tempfile.gettempdir())
    return Host(
        num_cores=len(os.sched_getaffinity(0)),
        memory=available_memory(),
        temporary=folder,
        free_temporary=shutil.disk_usage(folder).free,
        variables=dict(os.environ),
    )


def available_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes can still take: the machine's, or what is left under the control group's limit."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    assert found is not None, f"{meminfo} has no line MemAvailable"
    available = int(found[1]) << 10
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


def num_jobs(host: Host) -> int:
    """How many compilers run at a time: MAX_JOBS, or as many as cores and memory allow."""
    if wanted := host.variables.get("MAX_JOBS"):
        if not wanted.isdigit() or int(wanted) < 1:
            raise SystemExit(f"MAX_JOBS is {wanted!r}; it must be a number of compilers, 1 or more")
        return int(wanted)
    return max(1, min(host.num_cores, host.memory // JOB_MEMORY))


# The checks


def host_checks(host: Host, temporary: int = BUILD_DISK) -> list[Check]:
    """Compiler, memory, and ``temporary`` bytes for temporary files."""
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
    """Whether the environment fits on the disk of ``folder``."""
    return _disk("environment", folder, shutil.disk_usage(folder).free, INSTALL_DISK)


def package_checks(host: Host) -> list[Check]:
    """What requirements/gpu.txt installs."""
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
    """It must compile C++20, as torch 2.13 does, with the headers of this Python."""
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
    """A file or folder of an installed distribution."""
    return next((path for entry in sys.path if (path := Path(entry, relative)).exists()), None)


# The environment


def environment(host: Host) -> dict[str, str]:
    """Variables for pip, beside those that are set. The wheels' folders must be there (``package_checks``)."""
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
    """The environment's own programs first: ninja is one."""
    scripts = sysconfig.get_path("scripts")
    return os.pathsep.join([scripts, host.variables["PATH"]]) if "PATH" in host.variables else scripts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_chord.te_build", description=__doc__)
    parser.add_argument(
        "--first", action="store_true", help="only what must be there before anything is installed"
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
