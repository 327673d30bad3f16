"""Which evaluation is the best, when patience ends a run, and which settings are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.train.best import Best, value_in, value_of
from megatron_chord.train.evaluate import Evaluation, due_sets
from tests.support.ranks import ROOT

RUN = ROOT / "examples" / "arithmetic" / "chord_phi.yaml"


def evaluation(accuracy: float, metrics: dict[str, float] | None = None, **by_source: float) -> Evaluation:
    return Evaluation(
        accuracy=accuracy,
        num_problems=4,
        num_errors=0,
        response_length=1.0,
        truncated=0.0,
        interval=(0.0, 1.0),
        accuracy_by_source=by_source,
        metrics=metrics or {},
    )


def test_only_a_better_value_is_the_best() -> None:
    best = Best()
    assert [best.note(step, value) for step, value in [(2, 0.5), (4, 0.5), (6, 0.4)]] == [True, False, False]
    assert (best.step, best.value, best.since) == (2, 0.5, 2)
    again = Best()
    again.restore(json.loads(json.dumps(best.to_json())))
    assert again == best
    assert again.note(8, 0.6)
    assert (again.step, again.since) == (8, 0)
    again.restore(None)
    assert again.step == 8


def test_patience() -> None:
    assert [Best(since=since).is_exhausted(2) for since in range(4)] == [False, False, True, True]
    assert not Best(since=99).is_exhausted(None)


def test_what_is_compared() -> None:
    assert value_of(evaluation(0.5, amc=0.25, aime=0.75), "accuracy") == 0.5
    assert value_of(evaluation(0.5, amc=0.25, aime=0.75), "amc") == 0.25
    assert value_of(evaluation(0.5), "heldout") == 0.5  # the only source
    with pytest.raises(ValueError, match="no answer of amc could be graded"):
        value_of(evaluation(0.5, aime=0.75, math=0.1), "amc")


SETS = (
    "data.evaluation=null",
    "evaluation=[{name: amc, path: a.jsonl, every: 2, samples: 8, temperature: 1.0, metrics: [avg@8, pass@4]}, "
    "{name: heldout, path: b.jsonl, every: 3}]",
)


def test_every_set_has_its_own_interval_and_the_ends_have_all() -> None:
    run = load_config(RUN, [*SETS, "steps=7", "evaluation.problems=5"])
    due = [[asked.name for asked in due_sets(run, step)] for step in range(8)]
    assert due == [
        ["amc", "heldout"],
        [],
        ["amc"],
        ["heldout"],
        ["amc"],
        [],
        ["amc", "heldout"],
        ["amc", "heldout"],
    ]
    amc, heldout = run.evaluation.resolved()
    assert (amc.samples, amc.temperature, amc.problems, amc.metrics) == (8, 1.0, 5, ("avg@8", "pass@4"))
    assert (heldout.samples, heldout.temperature, heldout.metrics) == (1, 0.0, ("avg@1",))
    again = load_config(RUN, ["data.evaluation=x.jsonl", "steps=7", "evaluation.every=3"])
    assert [len(due_sets(again, step)) for step in range(8)] == [1, 0, 0, 1, 0, 0, 1, 1]


def test_what_is_compared_among_sets() -> None:
    found = {"amc": evaluation(0.5, {"avg@8": 0.5, "pass@4": 0.75})}
    assert value_in(found, "amc.pass@4") == 0.75
    assert value_in(found, "heldout.avg@1") is None, "not due at this step"
    assert value_in({"": evaluation(0.25)}, "accuracy") == 0.25
    with pytest.raises(ValueError, match="no problem of amc has avg@2"):
        value_in(found, "amc.avg@2")


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        (["checkpoint.keep_best=amc"], "checkpoint.keep_best: 'amc' is none of accuracy, problems_heldout"),
        (
            ["checkpoint.keep_best=accuracy", "evaluation.every=0"],
            "keep_best needs evaluations during the run",
        ),
        ([*SETS, "checkpoint.keep_best=amc"], "'amc' is none of amc.avg@8, amc.pass@4, heldout.avg@1"),
        ([*SETS, "checkpoint.keep_best=accuracy"], "'accuracy' is none of amc.avg@8"),
        (
            ["data.evaluation=null", "evaluation=[{name: a, path: a.jsonl}]", "checkpoint.keep_best=a.avg@1"],
            "checkpoint.keep_best: a.avg@1 is never measured during the run; give its set `every`",
        ),
        (SETS[1:], "data.evaluation and evaluation.sets both list held-out problems; give one of them"),
        (["evaluation=[{name: a, path: a.jsonl, samples: 2}]"], "a: 2 samples at temperature 0"),
        (
            ["evaluation=[{name: a, path: a, metrics: [avg@2]}]"],
            "a: avg@2 needs more answers than samples, which is 1",
        ),
        (
            ["evaluation=[{name: a, path: a, metrics: [maj@2]}]"],
            "metrics of a: 'maj@2' is neither avg@K nor pass@K",
        ),
        (["evaluation=[{name: a, path: a}, {name: a, path: b}]"], "evaluation.sets has several sets named a"),
        (["evaluation=[{name: a, file: a}]"], "unknown setting 'evaluation.sets.file'"),
        (["evaluation.temperature=3"], "evaluation.temperature must be <= 2, got 3.0"),
        (["evaluation=[{name: a, path: a, temperature: 3}]"], "a: temperature must be <= 2, got 3.0"),
        (["evaluation.patience=3"], "evaluation.patience needs checkpoint.keep_best"),
        (["checkpoint.export=best"], "checkpoint.export: best needs checkpoint.keep_best"),
    ],
)
def test_refused(overrides: Sequence[str], finding: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RUN, overrides)
    assert finding in str(error.value)
