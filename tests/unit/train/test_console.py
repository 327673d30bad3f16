"""The table that a run prints at its end."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from megatron_chord.train.console import summary


def row(step: int, evaluation: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "evaluation": evaluation}


def cells(table: Table | None) -> list[list[str]]:
    """The table's rows, without its heading."""
    assert table is not None
    columns = [list(column.cells) for column in table.columns]
    return [[str(cell) for cell in line] for line in zip(*columns, strict=True)]


def of_set(value: float) -> dict[str, float]:
    return {"accuracy": value, "avg@8": value, "response_length": 10.0, "truncated": 0.0}


PLAIN = {"accuracy": 0.25, "response_length": 12.0, "truncated": 0.0}


def test_one_line_for_each_evaluation() -> None:
    table = summary([{"step": 0, "loss": 1.0}, row(0, PLAIN), row(4, PLAIN | {"accuracy": 0.5})])
    assert [line[:2] for line in cells(table)] == [["before", "25.0 %"], ["after 4 steps", "50.0 %"]]


def test_one_line_for_each_set_that_has_a_first_and_a_last_evaluation() -> None:
    rows = [
        row(0, {"amc": of_set(0.25), "aime": of_set(0.5), "late": of_set(0.5)}),
        row(2, {"amc": of_set(0.5)}),
        row(4, {"amc": of_set(0.75), "aime": of_set(0.25)}),
    ]
    assert cells(summary(rows)) == [
        ["amc", "avg@8", "25.0 %", "75.0 %", "+50.0"],
        ["aime", "avg@8", "50.0 %", "25.0 %", "-25.0"],
    ]


def test_a_run_that_went_on_with_sets_shows_its_sets() -> None:
    rows = [row(0, PLAIN), row(2, {"amc": of_set(0.25)}), row(4, {"amc": of_set(0.5)})]
    assert cells(summary(rows)) == [["amc", "avg@8", "25.0 %", "50.0 %", "+25.0"]]


def test_nothing_was_evaluated() -> None:
    assert summary([{"step": 0, "loss": 1.0}]) is None
