"""Stopped processes of a run, as with a hung disk or driver, are noticed and named. The run replaces them or ends and
resumes.

The run has two real Megatron-Core ranks, a real vLLM server and a grader. The test also checks on which addresses it
listens. ``benchmarks/frozen.py`` stops processes in all phases.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import yaml

from megatron_chord.process_table import descendants
from megatron_chord.runtime.heartbeat import EXIT_CODE
from tests.e2e.test_run import (
    EXAMPLE,
    log_of,
    running,
    server_of,
    steps_done,
    still_alive,
    wait_for,
)
from tests.support.few_rows import few_rows
from tests.support.listening import addresses
from tests.support.processes import command_line, is_alive
from tests.support.task import metrics_of, run_cli

SILENCE_S = 15.0
SERVER_S = 40.0
"""Seconds. On a loaded machine the first token of a new server may take many of them."""


def write_config(folder: Path) -> Path:
    settings = {
        "output": str(folder / "out"),
        "steps": 4000,
        "seed": 3,
        "model": {"path": str(EXAMPLE / "policy"), "dtype": "fp32"},
        "data": {
            "prompts": str(few_rows(EXAMPLE / "problems_train.jsonl", folder / "data")),
            "demonstrations": str(few_rows(EXAMPLE / "demonstrations.jsonl", folder / "data")),
            "max_prompt_tokens": 64,
            "max_response_tokens": 32,
        },
        "parallel": {"ranks": 2},
        "batch": {"prompts": 2, "rollouts": 2, "demonstrations": 2, "max_tokens_per_gpu": 512},
        "method": {"mu": {"peak": 0.3}},
        "rollout": {"kv_cache_bytes": 64 * 2**20},
        "timeouts": {"weight_push_s": 30.0},
        "reward": {"kind": "exact", "workers": 1, "timeout_s": 6.0, "max_error_rate": 0.0},
        "optim": {"lr": 3e-4},
        "checkpoint": {"every": 1},
        "watchdog": {"beat_s": 0.5, "silence_s": SILENCE_S, "server_s": SERVER_S},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_frozen_server_grader_and_rank(tmp_path: Path) -> None:
    config, output = write_config(tmp_path), tmp_path / "out"
    with running(config, output) as process:
        wait_for(lambda: steps_done(output) >= 1, process)
        family = descendants(process.pid)
        ranks = [pid for pid in family if "megatron_chord.cli" in command_line(pid)]
        (grader,) = (pid for pid in family if "rewards.worker" in command_line(pid))
        assert len(ranks) == 2
        assert addresses([process.pid, *family]) == {"127.0.0.1"}

        # The stopped grading is not the text's fault: it is repeated, and no row counts a grader error.
        os.kill(grader, signal.SIGSTOP)
        done = steps_done(output)
        wait_for(lambda: not is_alive(grader) and steps_done(output) > done + 1, process)
        assert all(row["grader_errors"] == 0 for row in metrics_of(output))

        server = server_of(process)
        for pid in [server, *descendants(server)]:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: "a rollout server is lost; a new one is started" in log_of(output), process)
        done = steps_done(output)
        wait_for(lambda: steps_done(output) > done, process)
        assert not is_alive(server)

        victim = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(victim, signal.SIGSTOP)
        assert process.wait(300) == EXIT_CODE, log_of(output)
        assert not still_alive(family)
    (line,) = (line for line in log_of(output).splitlines() if "frozen: rank" in line)
    assert f"(process {victim}) has written no heartbeat" in line
    assert "frozen: rank 1 on " in line
    assert "it is stopped (SIGSTOP)" in line
    stacks = Path(re.findall(r"Stacks: (\S+)", line)[0])
    assert "Current thread" in (stacks / "rank-0.txt").read_text()

    saved = int((output / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    result = run_cli("train", str(config), f"steps={saved + 1}", "--resume", "auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{saved} of {saved + 1} steps done" in result.stdout
    assert [row["step"] for row in metrics_of(output) if "loss" in row] == list(range(saved + 1))
    assert not (output / ".heartbeats").exists()


def test_a_disk_that_does_not_answer_ends_a_run_of_one_rank(tmp_path: Path) -> None:
    """The run's file of metrics becomes a FIFO that nobody reads. The process that opens it waits for ever, as with
    a lost file server. Nothing is sampled, so no rollout server runs."""
    config, output = write_config(tmp_path), tmp_path / "out"
    settings = yaml.safe_load(config.read_text())
    settings["parallel"] = {}
    settings["checkpoint"] = {"every": 0}
    settings["method"] = {"mu": {"schedule": "constant", "peak": 1.0}}
    settings["watchdog"] |= {"saving_s": 5.0}
    config.write_text(yaml.safe_dump(settings))
    with running(config, output) as process:
        wait_for(lambda: steps_done(output) >= 1, process)
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "fifo").replace(output / "metrics.jsonl")
        assert process.wait(120) == EXIT_CODE, log_of(output)
    (line,) = (line for line in log_of(output).splitlines() if "frozen: rank" in line)
    assert "saving" in line
    stacks = Path(re.findall(r"Stacks: (\S+)", line)[0])
    assert "finish_step" in (stacks / "rank-0.txt").read_text()
