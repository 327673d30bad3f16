"""A run that gets worse on its two evaluation sets ends early, keeps its best checkpoint and exports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chord.rollout.server import RolloutServer
from tests.support.ranks import ROOT
from tests.support.task import cli_environment, metrics_of, run_cli

# The first step is small and hardly changes the policy. From the second step on the high rate destroys it.
SETTINGS = [
    "steps=9",
    "batch.prompts=2",
    "batch.rollouts=2",
    "batch.demonstrations=4",
    "optim.schedule=constant",
    "optim.lr=1.0",
    "optim.warmup_steps=8",
    "optim.clip_grad=0",
    "data.evaluation=null",
    "evaluation.sets=[{name: first, path: PROBLEMS, every: 1, problems: 16}, "
    "{name: few, path: PROBLEMS, every: 2, problems: 2, samples: 2, temperature: 1.0, metrics: [avg@2, pass@2]}]",
    "evaluation.patience=2",
    "checkpoint.keep=1",
    "checkpoint.keep_best=first.avg@1",
    "checkpoint.export=best",
    "rollout.max_logprob_gap=10",
    "rollout.max_probability_error=11",
]


@pytest.mark.usefixtures("server_key")
def test_the_best_checkpoint_is_kept_and_exported(tmp_path: Path, server: RolloutServer) -> None:
    output = tmp_path / "out"
    config = ROOT / "examples" / "arithmetic" / "chord_phi.yaml"
    problems = str(config.parent / "problems_heldout.jsonl")
    settings = [text.replace("PROBLEMS", problems) for text in SETTINGS]
    done = run_cli(
        "train", str(config), f"output={output}", f"rollout.servers=[{server.url}]", *settings, timeout_s=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    both = {row["step"]: row["evaluation"] for row in metrics_of(output) if "evaluation" in row}
    assert {step for step, sets in both.items() if "few" in sets} == {step for step in both if step % 2 == 0}
    for few in (sets["few"] for sets in both.values() if "few" in sets):
        assert few["avg@2"] == few["accuracy"] <= few["pass@2"]
    evaluations = {step: sets["first"] for step, sets in both.items()}
    accuracy = {step: found["accuracy"] for step, found in evaluations.items() if step > 0}
    best = max(accuracy, key=lambda step: (accuracy[step], -step))
    assert max(accuracy) == best + 2 < 9, "two evaluations after the best one it has had enough"
    assert f"stopped early after {best + 2} steps" in done.stdout
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == [
        f"step-{best:06d}",
        f"step-{best + 2:06d}",
    ]
    for found in evaluations.values():
        assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]
        assert 0 <= found["truncated"] <= 1
    verified = subprocess.run(
        [
            sys.executable,
            "tools/convert.py",
            "verify",
            output / "policy",
            output / "checkpoints" / f"step-{best:06d}",
        ],
        cwd=ROOT,
        env=cli_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
