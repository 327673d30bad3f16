"""Which evaluation is the best, when patience ends a run, and which settings are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.train.best import Best, value_of
from megatron_chord.train.evaluate import Evaluation
from tests.support.ranks import ROOT

RUN = ROOT / "examples" / "arithmetic" / "chord_phi.yaml"


def evaluation(accuracy: float, **by_source: float) -> Evaluation:
    return Evaluation(
        accuracy=accuracy,
        num_problems=4,
        num_errors=0,
        response_length=1.0,
        truncated=0.0,
        interval=(0.0, 1.0),
        accuracy_by_source=by_source,
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


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        (["checkpoint.keep_best=amc"], "checkpoint.keep_best: 'amc' is none of accuracy, problems_heldout"),
        (
            ["checkpoint.keep_best=accuracy", "evaluation.every=0"],
            "needs data.evaluation and evaluation.every",
        ),
        (["evaluation.patience=3"], "evaluation.patience needs checkpoint.keep_best"),
        (["checkpoint.export=best"], "checkpoint.export: best needs checkpoint.keep_best"),
    ],
)
def test_refused(overrides: list[str], finding: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(RUN, overrides)
    assert finding in str(error.value)
