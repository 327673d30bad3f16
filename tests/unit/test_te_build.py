"""The requirements of Transformer Engine's build, on made-up installations and hosts, with this machine's real
compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chord import te_build
from megatron_chord.te_build import GIB, JOB_MEMORY, Check, Host

ROOT = Path(__file__).parents[2]
WHEELS = Path("lib/site-packages")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with 64 cores. Only the packages of gpu.txt are on sys.path."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    sysconfig.get_config_vars()  # it imports a module of Python at its first call
    site = tmp_path / WHEELS
    for name in ("torch", *te_build.MODULES):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for header, (folder, _) in te_build.HEADERS.items():
        file = site / folder / header
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for program in (site / te_build.CUDA / "bin" / "nvcc", tmp_path / "bin" / "ninja"):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(mode=0o755)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.setattr(sysconfig, "get_path", _scripts(tmp_path / "bin"))
    return Host(
        num_cores=64,
        memory=512 * GIB,
        temporary=tmp_path,
        free_temporary=100 * GIB,
        variables={"PATH": "/usr/bin:/bin"},
    )


def _scripts(folder: Path):
    real = sysconfig.get_path
    return lambda name: str(folder) if name == "scripts" else real(name)


def lacks(host: Host) -> dict[str, Check]:
    return {check.name: check for check in te_build.checks(host) if not check.fits}


def test_nothing_is_lacking(host: Host) -> None:
    assert lacks(host) == {}


def test_no_compiler(host: Host, tmp_path: Path) -> None:
    check = lacks(replace(host, variables={"PATH": str(tmp_path)}))["C++ compiler"]
    assert check.found == "-"
    assert check.remedy.startswith("apt-get install g++ python3-dev")
    named = lacks(replace(host, variables={"PATH": "/usr/bin", "CXX": "no-such-compiler"}))
    assert "tried: no-such-compiler" in named["C++ compiler"].remedy


def test_a_compiler_that_is_too_old(host: Host, tmp_path: Path) -> None:
    """The real compiler is restricted to an older standard, so it does not know C++20."""
    old = tmp_path / "c++"
    old.write_text('#!/bin/sh\nexec /usr/bin/c++ "$@" -std=c++17\n')
    old.chmod(0o755)
    check = lacks(replace(host, variables={"PATH": "/usr/bin:/bin", "CXX": str(old)}))["C++ compiler"]
    assert "same_as" in check.found
    assert check.remedy.startswith("it must compile C++20")


def test_no_python_headers(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    check = lacks(host)["C++ compiler"]
    assert "Python.h" in check.found
    major, minor = sys.version_info[:2]
    assert check.remedy == f"Python's headers are missing: apt-get install python{major}.{minor}-dev"


@pytest.mark.parametrize("header", te_build.HEADERS)
def test_each_header_is_missed(host: Host, tmp_path: Path, header: str) -> None:
    folder, distribution = te_build.HEADERS[header]
    (tmp_path / WHEELS / folder / header).unlink()
    (check,) = lacks(host).values()
    assert check.found == f"without {header}"
    assert check.remedy.startswith(f"from {distribution}: pip install")


def test_programs_and_modules_are_missed(host: Host, tmp_path: Path) -> None:
    (tmp_path / "bin" / "ninja").unlink()
    (tmp_path / WHEELS / te_build.CUDA / "bin" / "nvcc").unlink()
    (tmp_path / WHEELS / "wheel-1.0.dist-info" / "METADATA").unlink()
    (tmp_path / WHEELS / "wheel-1.0.dist-info").rmdir()
    found = lacks(replace(host, variables={"PATH": "", "CXX": "/usr/bin/c++"}))
    assert set(found) == {"ninja", "nvcc", "Python packages"}
    assert found["Python packages"].found == "without wheel"


def test_memory_for_each_compiler(host: Host) -> None:
    assert te_build.num_jobs(host) == 64
    assert te_build.num_jobs(replace(host, memory=10 * JOB_MEMORY + 1)) == 10, "as many as memory allows"
    assert te_build.num_jobs(replace(host, memory=0)) == 1
    few = replace(host, memory=4 * JOB_MEMORY, variables=dict(host.variables) | {"MAX_JOBS": "16"})
    assert lacks(few)["memory"].remedy == "needs 3 GiB for each compiler: MAX_JOBS=4 make venv-gpu"
    assert (
        lacks(replace(host, memory=GIB))["memory"].remedy
        == "needs 3 GiB for each compiler: stop other programs"
    )
    with pytest.raises(SystemExit, match="MAX_JOBS is 'all'; it must be a number"):
        te_build.num_jobs(replace(host, variables={"MAX_JOBS": "all"}))


def test_available_memory_is_the_control_groups_where_that_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n")
    assert te_build.available_memory(meminfo, tmp_path) == 20000000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert te_build.available_memory(meminfo, tmp_path) == 20000000 * 1024
    (tmp_path / "memory.max").write_text("8000\n")
    assert te_build.available_memory(meminfo, tmp_path) == 3000
    # Pages of files that were written, as those of a checkpoint, are charged to the group but can be dropped.
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_anon 7\ninactive_file 4000\nactive_file 100\n")
    assert te_build.available_memory(meminfo, tmp_path) == 7000
    # A step of a Slurm job has a group of its own, below that of its job.
    step = tmp_path / "job_7" / "step_0"
    step.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/job_7/step_0\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 7000
    (step.parent / "memory.max").write_text("3000\n")
    (step.parent / "memory.current").write_text("1000\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 2000
    (step / "memory.max").write_text("500\n")
    (step / "memory.current").write_text("400\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 100


def test_available_memory_is_that_of_version_1_of_control_groups(tmp_path: Path) -> None:
    """The memory controller has a tree of its own. A container sees its group as the top of the tree."""
    meminfo, own, top = tmp_path / "meminfo", tmp_path / "own", tmp_path / "memory"
    meminfo.write_text("MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n")
    own.write_text("12:cpu,cpuacct:/other\n4:memory:/slurm/job_7/step_0\n0::/system.slice\n")
    step = top / "slurm" / "job_7" / "step_0"
    step.mkdir(parents=True)
    for group, limit, used in (
        (top, 9223372036854771712, 9000),
        (step.parent, 8000, 5000),
        (step, 9000, 4000),
    ):
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 3000
    (step.parent / "memory.stat").write_text("cache 9\ninactive_file 1\ntotal_inactive_file 1500\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 4500
    own.write_text("3:hugetlb,memory:/docker/0123\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 20000000 * 1024
    (top / "memory.limit_in_bytes").write_text("9500\n")
    assert te_build.available_memory(meminfo, tmp_path, own) == 500


def test_disk(host: Host, tmp_path: Path) -> None:
    check = lacks(replace(host, free_temporary=GIB // 2))["disk for temporary files"]
    assert check.found == f"0.5 GiB free in {tmp_path}"
    assert check.remedy == "needs 1 GiB: free some, or set TMPDIR to a folder on another disk"
    first = te_build.host_checks(replace(host, free_temporary=5 * GIB), te_build.DOWNLOAD_DISK)
    assert [check.name for check in first if not check.fits] == ["disk for temporary files"]


def test_the_wheels_are_shown_as_the_toolkit(host: Host, tmp_path: Path) -> None:
    own = dict(host.variables) | {
        "CUDA_HOME": "/usr/local/cuda-12.1",
        "CPATH": "/opt/include",
        "MAX_JOBS": "7",
    }
    shown = te_build.environment(replace(host, variables=own))
    site = tmp_path / WHEELS
    assert shown["CUDA_HOME"] == str(site / "nvidia/cu13")
    assert shown["CPATH"].split(":") == [
        *(str(site / "nvidia" / part / "include") for part in ("cu13", "cudnn", "nccl")),
        "/opt/include",
    ]
    assert shown["PATH"] == f"{tmp_path}/bin:/usr/bin:/bin", "ninja is the environment's own"
    assert shown["MAX_JOBS"] == "7"
    assert shown["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"


def test_the_command_stops_before_the_build_and_says_why(tmp_path: Path) -> None:
    """The real program and exit status; ``-S`` leaves out all packages."""
    command = [sys.executable, "-S", "-m", "megatron_chord.te_build", "touch", str(tmp_path / "built")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert "NO  headers: without cuda_runtime_api.h" in done.stdout
    assert "Without FP8: make venv-gpu FP8=0" in done.stderr
    assert "nvidia-cudnn-cu13" in done.stderr
    assert not (tmp_path / "built").exists()


def test_before_anything_is_installed_only_the_machine_is_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-m", "megatron_chord.te_build", "--first"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "C++ compiler" in done.stdout
    assert "disk for environment" in done.stdout
    assert "headers" not in done.stdout
