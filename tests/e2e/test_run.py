"""Whole runs as a user starts them: a resume is exact, a lost server is replaced, and a kill leaves nothing behind.

The runs use real Megatron-Core ranks over gloo, a real vLLM server and the quick start's policy, which gets some
rewards.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_chord.process_table import descendants
from megatron_chord.rollout.server import SERVER
from tests.support.few_rows import few_rows
from tests.support.processes import command_line, is_alive
from tests.support.ranks import ROOT
from tests.support.task import cli_environment, metrics_of, run_cli

EXAMPLE = ROOT / "examples" / "arithmetic"
STEPS = 4
PRINTED = "printed.txt"


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """The runs of this file share one core, so vLLM uses one thread. With one thread the bits of an answer do not
    depend on the other requests in the batch (test_repeatable.py), and no thread spins while it waits for another."""
    cores = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[worker % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")

    def data(name: str) -> str:
        return str(few_rows(EXAMPLE / f"{name}.jsonl", folder / "data"))

    settings = {
        "output": str(folder / "straight"),
        "steps": STEPS,
        "seed": 3,
        "model": {"path": str(EXAMPLE / "policy"), "dtype": "fp32"},
        "data": {
            "prompts": [
                {"path": data("problems_train"), "weight": 3, "name": "train"},
                {"path": data("problems_heldout"), "name": "more"},
            ],
            "demonstrations": [
                {"path": data("demonstrations"), "weight": 2},
                {"path": data("demonstrations_aligned")},
            ],
            "evaluation": data("problems_heldout"),
            "max_prompt_tokens": 64,
            "max_response_tokens": 64,
        },
        "batch": {"prompts": 4, "rollouts": 6, "demonstrations": 6, "max_tokens_per_gpu": 512},
        "method": {"mu": {"peak": 0.3}},
        "rollout": {"kv_cache_bytes": 64 * 2**20},
        "reward": {"kind": "exact", "workers": 1},
        "optim": {"lr": 3e-4, "warmup_steps": 2, "weight_decay": 0.1},
        "evaluation": {"problems": 8, "every": 2},
        "checkpoint": {"every": 2, "keep": 5, "asynchronous": True},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def straight(config: Path) -> Path:
    """The output of an uninterrupted run. The file beside it holds what the run printed, as for a terminal."""
    result = run_cli("train", str(config), FORCE_COLOR="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (config.parent / PRINTED).write_text(result.stdout)
    return config.parent / "straight"


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "tflops_per_gpu", "mfu")}
        for row in rows
    ]


def test_metrics_samples_and_policy_of_a_run(straight: Path) -> None:
    rows = metrics_of(straight)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(STEPS))
    assert [row["step"] for row in rows if "evaluation" in row] == [0, 2, 4]
    assert any(row["reward_mean"] > 0 for row in steps), "a task whose rewards are all 0 would prove little"
    for row in steps:
        assert row["mu"] == 0.3
        assert row["logprob_gap"] < 1e-4, "trainer and vLLM agree on the same tokens"
        assert row["clip_fraction"] == 0.0
        assert row["num_policy_tokens"] > 0
        assert row["num_sft_tokens"] > 0
        assert row["prompts"] == {"train": 3, "more": 1}
        assert row["reward_mean"] == pytest.approx(
            0.75 * row["reward"]["train"] + 0.25 * row["reward"]["more"]
        )
        assert row["accuracy"] == row["reward"]
        # The loss is the weighted sum of its branches. Each branch is a mean over its own tokens.
        assert row["loss"] == pytest.approx(0.7 * row["policy_loss"] + 0.3 * row["sft_loss"], rel=1e-5)
        assert 0 < row["sft_phi"] <= 0.25
        assert {"sample", "grade", "train", "sync", "total"} <= row["seconds"].keys()
    assert steps[-1]["logprob_gap_max"] < 1e-3
    assert len(list((straight / "samples").glob("step-*.jsonl"))) == STEPS
    assert list((straight / "tensorboard").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(straight / "policy")
    start = AutoModelForCausalLM.from_pretrained(EXAMPLE / "policy")
    assert AutoTokenizer.from_pretrained(straight / "policy").chat_template
    moved = [not a.equal(b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert all(moved)


def test_the_progress_bar_names_what_is_waited_for(straight: Path) -> None:
    """vLLM takes seconds to load, and the first evaluation waits for it."""
    before, waiting, after = (straight.parent / PRINTED).read_text().partition("waiting for vLLM")
    assert waiting
    assert "evaluating" not in before
    assert "evaluating" in after


def test_resume_is_the_uninterrupted_run(config: Path, straight: Path) -> None:
    resumed = config.parent / "resumed"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-000004")
    shutil.rmtree(resumed / "policy")
    result = run_cli("train", str(config), f"output={resumed}", "--resume", "auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 4 steps done" in result.stdout
    assert without_times(metrics_of(resumed)) == without_times(metrics_of(straight))
    assert (resumed / "policy" / "model.safetensors").read_bytes() == (
        straight / "policy" / "model.safetensors"
    ).read_bytes()


def test_ctrl_c_in_a_terminal_loses_nothing(config: Path, straight: Path) -> None:
    """The run gives up the step that it was sampling and repeats it equally later. The resumed run saves checkpoints by
    the clock."""
    output = config.parent / "stopped"
    with in_terminal(config, output, "checkpoint.every=0", "checkpoint.keep=9") as (process, keys):
        wait_for(lambda: steps_done(output) >= 1, process)
        os.write(keys, b"\x03")
        assert process.wait(300) == 75, log_of(output)
    done, said = steps_done(output), log_of(output)
    assert 1 <= done < STEPS
    assert "Ctrl-C: the run will write a checkpoint at the next safe point and end." in said
    assert f"stopped as requested: {done} of {STEPS} steps done. Continue with: megatron-chord train " in said
    assert "Traceback" not in said
    assert checkpoints_of(output) == [done]
    command = shlex.split(said.partition("Continue with: megatron-chord ")[2].splitlines()[0])
    refused = run_cli(*command, "optim.lr=1")
    assert refused.returncode == 2
    assert "optim.lr: 0.0003 -> 1.0" in refused.stderr
    assert steps_done(output) == done
    result = run_cli(*command, "checkpoint.every_minutes=1e-6")
    assert result.returncode == 0, result.stdout + result.stderr
    assert without_times(metrics_of(output)) == without_times(metrics_of(straight))
    assert checkpoints_of(output) == list(range(done, STEPS + 1))
    assert "resumed with another checkpoint.every_minutes: 30.0 -> 1e-06" in result.stdout
    assert [path.name for path in sorted((output / "configs").iterdir())] == [
        "step-000000.yaml",
        f"step-{done:06d}.yaml",
    ]
    assert (output / "report.html").is_file()


@pytest.mark.parametrize(
    ("offload", "sleeps", "wakes"),
    [
        (False, STEPS, STEPS),
        # Each of two checkpoints follows an evaluation and needs the optimizer state, so the server sleeps twice more.
        (True, STEPS + 2, STEPS + 1),
    ],
)
def test_sleeping_servers_and_offloading_trainers_change_no_number(
    offload: bool, sleeps: int, wakes: int, config: Path, straight: Path
) -> None:
    """Asleep, a server has no weights and no KV cache; on a CPU vLLM only stops scheduling.

    With ``rollout.offload`` the trainer has no optimizer state while it samples, on a CPU as on a GPU.
    """
    output = config.parent / f"sleeping-{offload}"
    settings = ("rollout.sleep=true", f"rollout.offload={str(offload).lower()}")
    result = run_cli("train", str(config), f"output={output}", *settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert without_times(metrics_of(output)) == without_times(metrics_of(straight))
    log = (output / "logs" / "rollout-server-1.log").read_text()
    assert log.count("to fall asleep") == sleeps
    for part in ("weights", "kv_cache"):
        assert log.count(f"wake up the engine with tags: ['{part}']") == wakes


def test_a_finished_folder_is_not_overwritten_silently(config: Path, straight: Path) -> None:
    result = run_cli("train", str(config))
    assert result.returncode == 2
    assert "already has a run" in result.stderr
    assert len(metrics_of(straight)) > STEPS


def test_a_killed_server_is_replaced_and_the_step_repeated(config: Path, straight: Path) -> None:
    """Both servers are repeatable. With one thread this does not change the bits, so other runs can be compared."""
    output = config.parent / "recovered"
    with running(config, output, "rollout.repeatable=true") as process:
        wait_for(lambda: steps_done(output) >= 1, process)
        server = server_of(process)
        assert "--max-num-active-seqs 1 " in command_line(server)
        os.kill(server, signal.SIGKILL)
        assert process.wait(300) == 0, log_of(output)
    assert "a rollout server is lost; a new one is started" in log_of(output)
    assert without_times(metrics_of(output)) == without_times(metrics_of(straight))


def test_a_killed_server_is_replaced_while_it_samples_ahead(config: Path) -> None:
    """New weights sample again what the server had not finished. Every step is trained."""
    output = config.parent / "recovered_ahead"
    with running(config, output, "rollout.asynchronous.max_off_policy_steps=1") as process:
        wait_for(lambda: steps_done(output) >= 1, process)
        os.kill(server_of(process), signal.SIGKILL)
        assert process.wait(300) == 0, log_of(output)
    assert "a rollout server is lost; a new one is started" in log_of(output)
    steps = [row for row in metrics_of(output) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(STEPS))
    ages = [row["step"] - row["weight_version"] for row in steps]
    assert ages == [row["staleness_max"] for row in steps]
    assert set(ages) <= {0, 1}


@pytest.mark.parametrize(
    ("ranks", "lag", "phase", "number"),
    [
        (1, 0, "the server starts", signal.SIGKILL),
        (1, 0, "training", signal.SIGKILL),
        (1, 0, "training", signal.SIGTERM),
        (1, 1, "training", signal.SIGTERM),
        (2, 0, "training", signal.SIGKILL),
        (2, 1, "training", signal.SIGTERM),
    ],
)
def test_no_process_survives_a_killed_run(
    config: Path, tmp_path: Path, ranks: int, lag: int, phase: str, number: int
) -> None:
    ahead = ["rollout.asynchronous.max_off_policy_steps=1"] if lag else []
    with running(config, tmp_path, f"parallel.ranks={ranks}", *ahead, "steps=1000") as process:
        started = "the server starts"
        wait_for(lambda: has_server(process) if phase == started else steps_done(tmp_path) >= 1, process)
        family = descendants(process.pid)
        assert len(family) >= (1 if phase == started else 2)
        process.send_signal(number)
        process.wait(240)
        left = still_alive(family)
        assert not left, f"still there after signal {number}: {left}"


@contextlib.contextmanager
def running(config: Path, output: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable,
        "-m",
        "megatron_chord.cli",
        "train",
        str(config),
        f"output={output}",
        *overrides,
    ]
    output.mkdir(exist_ok=True)
    with (output / "console").open("wb") as console:
        process = subprocess.Popen(
            command, env=cli_environment(), stdout=console, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def in_terminal(config: Path, output: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a run in a terminal of its own. Yield the process and the file descriptor of the keyboard."""
    keys, screen = pty.openpty()
    output.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_chord.cli", "train", str(config), f"output={output}", *overrides],
        env=cli_environment(),
        stdin=screen,
        stdout=screen,
        stderr=screen,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(screen)

    def copy() -> None:
        with (
            (output / "console").open("wb") as console,
            contextlib.suppress(OSError),
        ):  # ends when all have closed it
            while text := os.read(keys, 65536):
                console.write(text)
                console.flush()

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        yield process, keys
        reader.join(120)
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        os.close(keys)


def checkpoints_of(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


def log_of(output: Path) -> str:
    return (output / "console").read_text()


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return sum("loss" in row for row in metrics_of(output)) if path.is_file() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the run ended before its time"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def still_alive(pids: list[int], at_most_s: float = 120) -> list[int]:
    """Wait until none of the processes is alive, at most this long. Return those that are."""
    deadline = time.monotonic() + at_most_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def server_of(process: subprocess.Popen[bytes]) -> int:
    return next(pid for pid in descendants(process.pid) if SERVER in command_line(pid))


def has_server(process: subprocess.Popen[bytes]) -> bool:
    return any(SERVER in command_line(pid) for pid in descendants(process.pid))
