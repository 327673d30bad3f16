"""Rollouts of later steps are sampled while a step trains: by which weights, what a resume does, which methods allow
it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config_io import load_config
from megatron_chord.rollout.server import RolloutServer
from tests.e2e.test_stages import COMMON, SMALL
from tests.support.few_rows import with_few_rows
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

EXAMPLES = ROOT / "examples" / "methods"
LAGGED = SMALL | {"rollout.asynchronous.max_off_policy_steps": "1"}
EVALUATED = {
    "data.evaluation": str(ROOT / "examples" / "arithmetic" / "problems_heldout.jsonl"),
    "evaluation.problems": "8",
    "evaluation.every": "1",
}
pytestmark = pytest.mark.usefixtures("server_key")


class Stopped(SystemExit):
    """What the command line raises when a signal ends the run."""


def stop_before(step: int) -> Callable[[], None]:
    """Return a check that raises before step ``step``, as a signal does. It is called before every step of a run."""
    calls = iter(range(step + 1))

    def check() -> None:
        if next(calls) == step:
            raise Stopped

    return check


def train_in_turn(url: str, runs: list[tuple[Path, Path, dict[str, str], int | str]]) -> None:
    """Train each run. It is a file, an output folder, settings, and the step before which it stops or how it
    resumes."""
    from megatron_chord.train.loop import train

    for file, output, settings, how in runs:
        wanted = {**LAGGED, "rollout.servers": f"[{url}]", **settings, "output": str(output)}
        run = with_few_rows(load_config(file, [f"{name}={value}" for name, value in wanted.items()]))
        if isinstance(how, int):
            with pytest.raises(Stopped):
                train(run, check_stop=stop_before(how))
        else:
            train(run, resume=how, allow_changed=True)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "tflops_per_gpu", "mfu")}
        for row in metrics_of(folder)
    ]


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


def samples(folder: Path, step: int) -> list[dict[str, Any]]:
    text = (folder / "samples" / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_step_is_sampled_by_the_weights_of_the_step_before(server: RolloutServer, tmp_path: Path) -> None:
    """Steps 0 and 1 are sampled by the start weights. Their answers equal those of a policy that never moves."""
    lagging, still = tmp_path / "lagging", tmp_path / "still"
    runs = [
        (COMMON, lagging, EVALUATED, "never"),
        # This rate is too small to move an FP32 weight, so the run samples what an unchanged policy samples.
        (COMMON, still, {"rollout.asynchronous": "null", "optim.lr": "1e-30"}, "never"),
    ]
    run_ranks(train_in_turn, 1, server.url, runs)
    steps = [row for row in metrics_of(lagging) if "loss" in row]
    assert [row["weight_version"] for row in steps] == [0, 0, 1, 2]
    assert [row["staleness_mean"] for row in steps] == [0.0, 1.0, 1.0, 1.0]
    assert [row["staleness_max"] for row in steps] == [0, 1, 1, 1]
    assert [{row["weight_version"] for row in samples(lagging, step)} for step in range(4)] == [
        {0},
        {0},
        {1},
        {2},
    ]
    for step, same in ((0, True), (1, True), (2, False)):
        ours, theirs = ([row["response"] for row in samples(folder, step)] for folder in (lagging, still))
        assert (ours == theirs) is same, step
        assert [row["prompt_id"] for row in samples(lagging, step)] == [
            row["prompt_id"] for row in samples(still, step)
        ]
    assert steps[0]["logprob_gap"] < 1e-4, "the first step's rollouts are the present policy's"
    assert min(row["logprob_gap"] for row in steps[1:]) > 1e-3, "later ones are of a policy that has moved"
    assert [row["step"] for row in metrics_of(lagging) if "evaluation" in row] == [0, 1, 2, 3, 4]


METHODS: dict[str, tuple[Path, dict[str, str]]] = {
    "chord_and_evaluation": (COMMON, {**EVALUATED, "method.mu": "{peak: 0.3}"}),
    "corrected_by_weights": (COMMON, {"objective.ratio_from": "recomputed", "batch.updates_per_step": "2"}),
    "dynamic_sampling_and_demonstrations": (
        EXAMPLES / "luffy.yaml",
        {"batch.demonstrations": "0", "batch.sampling_attempts": "3"},
    ),
    "hints": (EXAMPLES / "ghpo.yaml", {"batch.demonstrations": "0"}),
    "prefixes": (EXAMPLES / "prefix_rft.yaml", {"batch.demonstrations": "0"}),
    "pairs": (EXAMPLES / "dpo_mixed_pairs.yaml", {"batch.demonstrations": "0"}),
    "sft_then_rl": (COMMON, {"method.mu": "{schedule: binary, switch_step: 2}"}),
    "reward_adaptive": (COMMON, {"method.mu": "{schedule: reward_adaptive, tau: 0.9}"}),
}


@pytest.fixture(scope="module")
def folders(server: RolloutServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every method: a straight run, and a run that stopped before step 2 and resumed in another process.

    Before the stop, weights 1 had sampled step 2. After the resume these weights do not exist any more.
    """
    folder = tmp_path_factory.mktemp("lag")
    begun: list[tuple[Path, Path, dict[str, str], int | str]] = []
    resumed: list[tuple[Path, Path, dict[str, str], int | str]] = []
    for name, (file, settings) in METHODS.items():
        begun += [(file, folder / name / "straight", settings, "never")]
        begun += [(file, folder / name / "resumed", settings, 2)]
        resumed += [(file, folder / name / "resumed", settings, "auto")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", server.api_key)
        run_ranks(train_in_turn, 1, server.url, begun)
        for name in METHODS:
            output = folder / name / "resumed"
            assert [row["step"] for row in metrics_of(output) if "loss" in row] == [0, 1]
            state = json.loads((output / "checkpoints" / "step-000002" / "run.json").read_text())
            assert [(record["step"], record["version"]) for record in state["ahead"]] == [(2, 1)]
        run_ranks(train_in_turn, 1, server.url, resumed)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(folders: Path, name: str) -> None:
    straight, resumed = folders / name / "straight", folders / name / "resumed"
    assert numbers(resumed) == numbers(straight)
    assert weights(resumed) == weights(straight)
    files = sorted(path.name for path in (straight / "samples").iterdir())
    assert sorted(path.name for path in (resumed / "samples").iterdir()) == files
    for file in files:
        assert (resumed / "samples" / file).read_bytes() == (straight / "samples" / file).read_bytes()


def test_the_correction_is_on_by_default(folders: Path) -> None:
    rows = metrics_of(folders / "corrected_by_weights" / "straight")
    assert rows[0]["correction_weight"] == pytest.approx(1.0, abs=1e-5), "sampled by the present weights"
    assert max(abs(row["correction_weight"] - 1) for row in rows[1:]) > 1e-3
    ratios = [row for row in metrics_of(folders / "chord_and_evaluation" / "straight") if "loss" in row]
    assert rows[1]["logprob_gap"] > 1e-3
    assert "correction_weight" not in ratios[1], "the ratio's denominator is the policy that sampled"


def test_a_checkpoint_is_not_resumed_with_other_settings(
    folders: Path, server: RolloutServer, tmp_path: Path
) -> None:
    file, settings = METHODS["chord_and_evaluation"]
    for other, reason in (
        ({"rollout.temperature": "0.9"}, r"answers were sampled with .*'temperature': 1\.0"),
        (
            {"batch.prompts": "5"},
            r"answers to the prompts .* \were recorded, but those to .* \(5\) are requested",
        ),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(folders / "chord_and_evaluation" / "straight", tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
        runs = [(file, tmp_path / "run", {**settings, **other}, "auto")]
        with pytest.raises(RuntimeError, match=reason):
            run_ranks(train_in_turn, 1, server.url, runs)


def test_two_ranks(folders: Path, server: RolloutServer, tmp_path: Path) -> None:
    file, settings = METHODS["chord_and_evaluation"]
    run_ranks(train_in_turn, 2, server.url, [(file, tmp_path / "two", settings, "never")])
    one, two = metrics_of(folders / "chord_and_evaluation" / "straight"), metrics_of(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    first, second = ([row for row in rows if "loss" in row][:2] for rows in (one, two))
    for ours, theirs in zip(first, second, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert ours["reward_mean"] == theirs["reward_mean"]
        assert ours["staleness_max"] == theirs["staleness_max"]


@pytest.mark.parametrize("lag", [1, 2])
def test_with_keep_requests_go_on_with_new_weights(server: RolloutServer, tmp_path: Path, lag: int) -> None:
    settings = {
        "rollout.asynchronous.max_off_policy_steps": str(lag),
        "rollout.asynchronous.in_flight": "keep",
        "steps": "6",
        **EVALUATED,
    }
    run_ranks(train_in_turn, 1, server.url, [(COMMON, tmp_path / "kept", settings, "never")])
    steps = [row for row in metrics_of(tmp_path / "kept") if "loss" in row]
    assert len(steps) == 6
    assert all(row["staleness_max"] <= lag for row in steps)
    assert steps[-1]["staleness_mean"] > 0
    assert all(row["weight_version"] == row["step"] - row["staleness_max"] for row in steps)
