"""The points of the curves are compared with hand arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chord.report.curves import CHARTS, Chart, all_charts, curves, totals
from megatron_chord.report.folder import RunRecord, interval
from tests.unit.report.runs import rows_of_quickstart

REWARD = [Chart(group="", title="", metrics=("reward_mean", "kl"), help="")]


def record(steps: list[dict[str, Any]], *evaluations: dict[str, Any], **settings: Any) -> RunRecord:
    return RunRecord(name="run", folder=Path(), settings=settings, steps=steps, evaluations=evaluations)


def row(step: int, reward: float | None, **more: Any) -> dict[str, Any]:
    given = {} if reward is None else {"reward_mean": reward}
    return {"step": step, **given, "tokens_per_s": 100.0, "seconds": {"total": 36.0}, **more}


def test_a_short_run_keeps_every_step() -> None:
    found = curves(record([row(0, 0.25), row(1, None), row(2, 0.75)]), REWARD)
    assert found["x"] == {"step": [1, 2, 3], "tokens": [3600, 7200, 10800], "hours": [0.01, 0.02, 0.03]}
    assert found["series"] == {"reward_mean": {"mean": [0.25, None, 0.75]}}


def test_a_long_run_has_fewer_points_and_keeps_extreme_steps() -> None:
    rewards = [0.0, 1.0, 0.5, 0.25, 9.0, 0.25, 1.0]
    found = curves(record([row(step, reward) for step, reward in enumerate(rewards)]), REWARD, most_points=3)
    assert found["x"]["step"] == [3, 6, 7]
    assert found["x"]["tokens"] == [10800, 21600, 25200]
    assert found["series"]["reward_mean"] == {
        "mean": [0.5, pytest.approx(9.5 / 3, rel=1e-4), 1.0],
        "low": [0.0, 0.25, 1.0],
        "high": [1.0, 9.0, 1.0],
    }


def test_a_run_without_a_step_has_no_points() -> None:
    found = curves(record([]), REWARD)
    assert found["series"] == {}
    assert found["x"] == {"step": [], "tokens": [], "hours": []}
    assert totals(record([])) == (0.0, 0.0)


def test_phases_add_up_to_the_step() -> None:
    steps = [row for row in rows_of_quickstart() if "seconds" in row]
    found = curves(record(steps), [])["phases"]
    for index, step in enumerate(steps):
        total = sum(values[index] for values in found.values())
        assert total == pytest.approx(step["seconds"]["total"], rel=1e-3)
    assert set(found) == {"weight push", "sampling", "grading", "packing", "training", "other"}


def test_with_sampling_ahead_a_step_only_waited() -> None:
    seconds = {"total": 5.0, "collect": 1.0, "train": 3.0, "sample": 4.0, "grade": 1.0}
    run = record([row(0, 0.5) | {"seconds": seconds}], rollout={"asynchronous": {"max_off_policy_steps": 1}})
    assert curves(run, [])["phases"] == {"waiting": [1.0], "training": [3.0], "other": [1.0]}


def test_numbers_that_no_chart_shows_get_their_own() -> None:
    charts = all_charts([record([row(0, 0.5, mu=0.5, new_number=3, not_finite=["loss"], weight_version=4)])])
    assert [chart.title for chart in charts] == ["Reward", "mu", "Tokens per second", "new_number"]
    assert len({name for chart in CHARTS for name in chart.metrics}) == sum(
        len(chart.metrics) for chart in CHARTS
    )


def test_the_numbers_of_sources_and_terms_have_curves() -> None:
    """A source without prompts in a step has no number for it. A run may lack a source that another has."""
    first = {
        "prompts": {"a": 2, "mean": 1},
        "reward": {"a": 0.25, "mean": 1.0},
        "reward_terms": {"math": 0.5},
    }
    second = {"prompts": {"a": 3}, "reward": {"a": 0.75}, "reward_terms": {"math": 0.0, "math.form": 1.0}}
    steps = [row(0, 0.5) | first, row(1, 0.75) | second]
    other = [
        row(0, 0.5) | {"reward": {"b": 0.5}, "accuracy": {"b": 0.125}, "new_block": {"y": 1.0, "x": 2.0}}
    ]
    charts = all_charts([record(steps), record(other)])
    assert {
        chart.title: chart.metrics for chart in charts if chart.title not in ("Reward", "Tokens per second")
    } == {
        "Reward by source": ("reward/a", "reward/b", "reward/mean"),
        "Score by source": ("accuracy/b",),
        "Reward terms": ("reward_terms/math", "reward_terms/math.form"),
        "Prompts by source": ("prompts/a", "prompts/mean"),
        "new_block": ("new_block/x", "new_block/y"),
    }
    found = curves(record(steps), charts)["series"]
    assert found["reward/a"] == {"mean": [0.25, 0.75]}
    assert found["reward/mean"] == {"mean": [1.0, None]}
    assert found["reward_terms/math"] == {"mean": [0.5, 0.0]}
    assert found["prompts/a"] == {"mean": [2.0, 3.0]}
    assert found["reward_mean"] == {"mean": [0.5, 0.75]}
    assert "reward/b" not in found
    thinned = curves(record(steps), charts, most_points=1)["series"]
    assert thinned["reward/a"] == {"mean": [0.5], "low": [0.25], "high": [0.75]}


def test_evaluations_stand_at_the_tokens_of_their_step() -> None:
    evaluation = {"accuracy": 0.5, "num_problems": 4, "num_errors": 0, "response_length": 8.0}
    run = record(
        [row(0, 0.1), row(1, 0.2)],
        {"step": 0, "evaluation": evaluation},
        {"step": 2, "evaluation": evaluation},
    )
    (whole,) = curves(run, [])["evaluations"]
    assert whole["name"] == ""
    first, last = whole["points"]
    assert (first["step"], first["tokens"], first["hours"]) == (0, 0, 0)
    assert (last["step"], last["tokens"], last["hours"]) == (2, 7200, 0.02)


@pytest.mark.parametrize(("p", "n"), [(0.26, 200), (0.0, 50), (1.0, 50), (0.5, 3)])
def test_the_interval_is_where_wilsons_test_no_longer_refuses(p: float, n: int) -> None:
    """The ends q of the interval are the roots of (p - q)^2 = z^2 q (1 - q) / n."""
    z2 = 1.96**2
    ends = sorted(np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p]).real)
    evaluation = {"accuracy": p, "num_problems": n, "num_errors": 0}
    assert interval(evaluation, samples=1) == pytest.approx(ends, abs=1e-9)


def test_an_interval_of_the_run_itself_rules() -> None:
    assert interval({"accuracy": 0.5, "num_problems": 9, "interval": [0.4, 0.6]}, samples=1) == (0.4, 0.6)
    assert interval({"accuracy": 0.0, "num_problems": 2, "num_errors": 2}, samples=1) == (0.0, 1.0)
