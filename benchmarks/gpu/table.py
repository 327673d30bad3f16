"""The rows of a run, or of several, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.gpu.driver import ROWS, WHOLE
from benchmarks.gpu.rows import UNITS, Row, read_rows

WIDTH = 150


def rows_of(folders: Sequence[Path]) -> list[Row]:
    """Return all rows of finished runs.

    Raises:
        ValueError: a folder has no rows.
    """
    found: list[Row] = []
    for folder in folders:
        rows = read_rows(folder / ROWS)
        if not rows:
            raise ValueError(
                f"{folder / ROWS} does not exist or is empty: {folder} is not the folder of a run"
            )
        found += rows
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("part", "case", show_lines=False)
    for heading in ("ms", "rate", "of the ceiling"):
        table.add_column(heading, justify="right")
    table.add_column("more", overflow="fold")
    for part, group in groupby(rows, key=lambda row: row["part"]):
        for index, row in enumerate(group):
            more = Text(_more(row), style="bold red" if row["status"] == "failed" else "")
            table.add_row(part if index == 0 else "", row["case"], *_numbers(row), more)
        table.add_section()
    console.print(table)
    for line in _footer(rows):
        console.print(line, highlight=False, soft_wrap=True)


def save(rows: Sequence[Row], path: Path) -> None:
    with path.open("w") as file:
        show(rows, Console(file=file, width=WIDTH))


def _numbers(row: Row) -> tuple[str, str, str]:
    seconds, rate, share = (row.get(name) for name in ("seconds", "rate", "share"))
    unit = UNITS.get(row.get("ceiling", ""), "")
    return (
        "" if seconds is None else f"{1e3 * seconds:,.2f}",
        "" if rate is None else f"{rate / 1e12:.3g} {unit}",
        "" if share is None else f"{share:.0%} of {row['ceiling']}",
    )


def _more(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('reason', '')}"
    return ", ".join(f"{name} {_text(value)}" for name, value in row.get("details", {}).items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _footer(rows: Sequence[Row]) -> list[str]:
    """Return the description of each run once, and the number of parts by status."""
    runs: dict[str, None] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        runs[
            f"{row['date']}; {row['gpu']}; {versions}, CUDA {row['cuda'] or '-'}; commit {row['commit']}; "
            f"{row['command']}"
        ] = None
    wholes = [row for row in rows if row["case"] == WHOLE]
    counts = {
        status: sum(row["status"] == status for row in wholes) for status in ("ok", "failed", "not run")
    }
    failed = sum(row["status"] == "failed" for row in rows if row["case"] != WHOLE)
    parts = ", ".join(f"{count} {status}" for status, count in counts.items())
    return [*runs, f"parts: {parts}; failed rows within parts: {failed}"]
