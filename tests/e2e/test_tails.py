"""Runs that stop sampling early, on a real server: what they train on, and what they continue with after a resume.

The rate of 1e-30 hardly moves the weights. So every token must have the log-prob that the trainer computes for it,
whichever step sampled the token.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.data.cursor import Cursor
from megatron_chord.rollout.server import RolloutServer
from tests.e2e.test_lag import EVALUATED, EXAMPLES, samples, train_in_turn
from tests.e2e.test_stages import COMMON
from tests.support.few_rows import ROWS
from tests.support.ranks import ROOT, run_ranks
from tests.support.task import metrics_of

STEPS, STOP = 5, 3
STILL = {
    "steps": str(STEPS),
    "rollout.asynchronous": "null",
    "rollout.partial.extra_prompts": "0.5",
    "rollout.temperature": "1.5",  # this gives answers of many lengths
    "data.max_prompt_tokens": "60",
    "data.max_response_tokens": "100",
    "optim.lr": "1e-30",
    "checkpoint.every": str(STOP),
    "checkpoint.keep": "9",
}
LAGGED = {"rollout.asynchronous.max_off_policy_steps": "1"}
RUNS: dict[str, tuple[Path, dict[str, str]]] = {
    "carry": (COMMON, {}),
    "drop": (COMMON, {"rollout.partial.unfinished": "drop"}),
    "drain": (COMMON, {**LAGGED, **EVALUATED}),
    "keep": (COMMON, {**LAGGED, "rollout.asynchronous.in_flight": "keep"}),
    "demonstrations": (
        EXAMPLES / "luffy.yaml",
        {"batch.demonstrations": "0", "batch.sampling_attempts": "2"},
    ),
}
CARRYING = [name for name in RUNS if name != "drop"]


@pytest.fixture(scope="module")
def folders(server: RolloutServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs. Each run stopped before a step and resumed in another process."""
    folder = tmp_path_factory.mktemp("tails")
    runs = [(file, folder / name, {**STILL, **settings}) for name, (file, settings) in RUNS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", server.api_key)
        run_ranks(train_in_turn, 1, server.url, [(*run, STOP) for run in runs])
        run_ranks(train_in_turn, 1, server.url, [(*run, "auto") for run in runs])
    return folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_of(folder) if "loss" in row]


def prompts_of(folder: Path, step: int) -> list[str]:
    """Return the prompts of a step's groups, and check that the rollouts of each group are consecutive."""
    rows = samples(folder, step)
    names = [row["prompt_id"] for row in rows[::4]]
    assert [row["prompt_id"] for row in rows] == [name for name in names for _ in range(4)]
    return names


def state_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"step-{step:06d}" / "run.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_every_token_has_the_log_prob_of_the_weights_that_sampled_it(folders: Path, name: str) -> None:
    steps = steps_of(folders / name)
    assert [row["step"] for row in steps] == list(range(STEPS))
    assert max(row["logprob_gap_max"] for row in steps) < 1e-3
    assert sum(row["unfinished_tokens"] for row in steps) > 0, "something was stopped on its way"


@pytest.mark.parametrize("name", CARRYING)
def test_what_was_stopped_is_finished_later(folders: Path, name: str) -> None:
    folder = folders / name
    rows = [(step, row) for step in range(STEPS) for row in samples(folder, step)]
    assert sum(row["continued_prompts"] for row in steps_of(folder)) > 0
    mixed = [(step, row) for step, row in rows if len(row["weight_spans"]) > 1]
    assert mixed
    assert all(sum(count for _, count in row["weight_spans"]) == row["num_tokens"] <= 100 for _, row in rows)
    assert all(row["num_tokens"] == 100 for _, row in rows if row["finish_reason"] == "length")
    assert any(row["weight_spans"][0][0] < STOP <= step for step, row in rows), "and across the resume"


@pytest.mark.parametrize("name", ["carry", "keep", "drain"])
def test_no_prompt_is_lost_or_seen_twice(folders: Path, name: str) -> None:
    folder, last = folders / name, state_of(folders / name, STEPS)
    trained = [prompt for step in range(STEPS) for prompt in prompts_of(folder, step)]
    assert len(trained) == STEPS * 4
    left = [item["prompt"] for item in last["unfinished"]["prompts"]]
    assert len(left) == 2
    cursor = Cursor(**{**last["cursors"]["prompts"], "position": 0})
    assert last["cursors"]["prompts"]["position"] == STEPS * 4 + 2
    problems = (ROOT / "examples" / "arithmetic" / "problems_train.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in problems[:ROWS]]
    assert cursor.size == ROWS
    assert Counter([*trained, *left]) == Counter(ids[index] for index in cursor.take(STEPS * 4 + 2)[0])


def test_a_checkpoint_holds_the_tokens_of_what_was_stopped(folders: Path) -> None:
    begun = [
        item
        for item in state_of(folders / "carry", STOP)["unfinished"]["prompts"]
        if item["partial_rollouts"]
    ]
    assert begun
    rows = [row for step in range(STOP, STEPS) for row in samples(folders / "carry", step)]
    for item in begun:
        later = [row for row in rows if row["prompt_id"] == item["prompt"]]
        assert len(item["partial_rollouts"]) == 4
        for rollout, row in zip(item["partial_rollouts"], later, strict=False):
            tokens = len(rollout["token_ids"])
            assert tokens == len(rollout["logprobs"])
            assert row["num_tokens"] >= tokens
            assert (row["num_tokens"] == tokens) == (rollout["finish_reason"] != "abort")


def test_dropped_prompts_are_counted(folders: Path) -> None:
    steps = steps_of(folders / "drop")
    assert [row["unfinished_prompts"] for row in steps] == [2] * STEPS
    assert all(row["weight_version"] == row["step"] for row in steps)
    assert state_of(folders / "drop", STEPS)["unfinished"]["prompts"] == []
    assert state_of(folders / "drop", STEPS)["cursors"]["prompts"]["position"] == STEPS * 6


def test_evaluations_are_not_stopped(folders: Path) -> None:
    evaluated = [row["evaluation"] for row in metrics_of(folders / "drain") if "evaluation" in row]
    assert [result["num_problems"] for result in evaluated] == [8] * (STEPS + 1)
    assert len({result["response_length"] for result in evaluated}) == 1, (
        "the same answers of the same weights"
    )
