"""Functions that write and read files for tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest


def write_rows(path: Path, *rows: object) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_set(name: str) -> Path:
    """The folder of a public data set. Skips the test where it is absent."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("MEGATRON_CHORD_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}; name the folder of the data sets in MEGATRON_CHORD_DATA")
    return folder
