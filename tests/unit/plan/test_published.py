"""The planner is compared with published runs: benchmarks/planner.py as a test."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.planner import LARGEST, MEDIAN, Row, rows
from benchmarks.planner_fit import START, fit
from megatron_chord.plan.constants import CONSTANTS


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


def test_enough_rows_and_enough_unseen_ones(found: list[Row]) -> None:
    runs = {use: {(row.name, row.source) for row in found if row.use == use} for use in ("fitted", "unseen")}
    assert len(runs["fitted"] | runs["unseen"]) >= 40
    assert len(runs["unseen"]) >= 12
    assert not runs["fitted"] & runs["unseen"]
    assert all(row.source for row in found)


@pytest.mark.parametrize("use", ["fitted", "unseen"])
def test_the_median_error(found: list[Row], use: str) -> None:
    errors = [abs(row.error) for row in found if row.use == use]
    assert statistics.median(errors) <= MEDIAN
    assert max(errors) <= LARGEST


def test_the_constants_are_those_of_the_fit() -> None:
    fitted = fit()
    assert fitted.keys() == START.keys()
    for name, value in fitted.items():
        assert getattr(CONSTANTS, name) == pytest.approx(value, rel=0.02), name
