"""The project's own tests of a GPU, as rows: one for each file, and one for each test that failed."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from typing import Any

import pytest

from benchmarks.gpu.rows import Rows, parser_of

STRICT = "addopts=--strict-markers -ra"
"""--strict-config is left out, because a machine may lack the plugins whose settings pyproject.toml holds."""


class Recorder:
    """A pytest plugin that counts outcomes by file."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report.nodeid, report.longreprtext)

    def pytest_runtest_logreport(self, report: Any) -> None:
        file = report.nodeid.partition("::")[0]
        if report.skipped:
            self.counts[file]["skipped"] += 1
            self.reasons[file][_skip_reason(report)] += 1
        elif report.failed:
            self.counts[file]["failed"] += 1
            self._failed(report.nodeid, report.longreprtext)
        elif report.when == "call":
            self.counts[file]["passed"] += 1

    def _failed(self, name: str, text: str) -> None:
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        self._rows.failed(name, (lines or text.strip().splitlines() or ["no reason given"])[0][:300])


def _skip_reason(report: Any) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix(
        "Skipped: "
    )


def main() -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("tests", nargs="+", help="files for pytest")
    parser.add_argument("--only", help="as pytest's -k")
    arguments = parser.parse_args()
    rows = Rows(arguments.rows, arguments.part)
    recorder = Recorder(rows)
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-o", STRICT]
    options += ["-k", arguments.only] if arguments.only else []
    start = time.perf_counter()
    code = pytest.main([*options, *arguments.tests], plugins=[recorder])
    for file, counts in recorder.counts.items():
        ran = counts["passed"] + counts["failed"]
        why = "; ".join(f"{count}: {reason}" for reason, count in recorder.reasons[file].items())
        if ran:
            rows.found(file, **counts, **({"skipped_because": why} if why else {}))
        else:
            rows.not_run(file, why)
    rows.found("all", elapsed_s=time.perf_counter() - start)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
