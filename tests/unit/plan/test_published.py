"""The planner is compared with published runs: benchmarks/planner.py as a test."""

from __future__ import annotations

import pytest

from benchmarks.planner import LIMIT, Row, main, rows


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.use}: {row.name}, {row.what}")
def test_within_a_fifth(row: Row) -> None:
    assert abs(row.error) <= LIMIT


def test_rows_were_held_back() -> None:
    uses = [row.use for row in rows()]
    assert uses.count("held back") >= uses.count("calibrated")


def test_the_program_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "PASS" in capsys.readouterr().out
