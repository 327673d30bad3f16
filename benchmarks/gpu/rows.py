"""Rows of results: what one part of a run measured, checked or could not do. A row is one line of JSON.

``part`` and ``case`` name what a row is about. ``status`` is ok, failed or not run; the latter two have a ``reason``.
A measured row has ``seconds``. If a ceiling limits it, it also has the ``amount`` of work (FLOPs or bytes) and the
``ceiling``'s name. ``details`` are further numbers and words. The driver adds ``rate``, ``share`` (of the ceiling that
the same run measured) and a description of the run: date, GPU, versions, commit, command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
Ceiling = Literal["products", "fp8 products", "copies", "to the host", "from the host"]
UNITS: dict[Ceiling, str] = {
    "products": "TFLOP/s",
    "fp8 products": "TFLOP/s",
    "copies": "TB/s",
    "to the host": "TB/s",
    "from the host": "TB/s",
}
CEILINGS = "ceilings"
"""The part that measures the ceilings. Each of its rows is the ceiling with the row's name."""


class Rows:
    """The file to which one part appends each row at once, so that a part that is stopped keeps what it measured."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part

    def measured(
        self,
        case: str,
        seconds: float,
        *,
        amount: float | None = None,
        ceiling: Ceiling | None = None,
        **details: Any,
    ) -> None:
        """Add a measured time. ``amount`` is the FLOPs, or the bytes read plus written, that ``ceiling`` limits."""
        self._write(case, "ok", seconds=seconds, amount=amount, ceiling=ceiling, details=details)

    def found(self, case: str, **details: Any) -> None:
        """Add numbers that are not times."""
        self._write(case, "ok", details=details)

    def failed(self, case: str, reason: str, **details: Any) -> None:
        self._write(case, "failed", reason=reason, details=details)

    def not_run(self, case: str, reason: str) -> None:
        self._write(case, "not run", reason=reason)

    def _write(self, case: str, status: str, **fields: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(make_row(self._part, case, status, **fields)) + "\n")


def make_row(part: str, case: str, status: str, **fields: Any) -> Row:
    given = {name: value for name, value in fields.items() if value is not None}
    return {"part": part, "case": case, "status": status, **given}


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that the driver gives every part."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=Path, required=True, help="file to which rows are appended")
    parser.add_argument("--part", required=True, help="name of this part in its rows")
    parser.add_argument("--tiny", action="store_true", help="shapes for a rehearsal on a CPU")
    return parser


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, or none if it does not exist. An incomplete last line is left out."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: {error}") from error
    return rows


def ceilings(rows: Iterable[Row]) -> dict[str, float]:
    """Return FLOP/s or bytes per second of each ceiling that these rows measured."""
    return {
        row["ceiling"]: row["amount"] / row["seconds"]
        for row in rows
        if row["part"] == CEILINGS and row["status"] == "ok" and "ceiling" in row
    }


def completed(row: Row, bounds: Mapping[str, float], circumstances: Mapping[str, Any]) -> Row:
    """Return rows with ``rate``, with ``share`` if their ceiling was measured, and with the description of the run."""
    derived: Row = {}
    if row.get("amount") and row.get("seconds"):
        derived["rate"] = row["amount"] / row["seconds"]
        if row["ceiling"] in bounds:
            derived["share"] = derived["rate"] / bounds[row["ceiling"]]
    return {**row, **derived, **circumstances}
