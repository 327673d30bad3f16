"""Run parts one after another, each in a process of its own with its time limit. Keep rows, logs and the table.

A run's folder has ``rows.jsonl`` (all rows, complete), ``table.txt``, and of each part ``NAME.log``, ``NAME.jsonl``
(its rows as it wrote them) and, of updates, ``NAME-profile.txt``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.machine import ROOT, Machine
from benchmarks.gpu.parts import Part
from benchmarks.gpu.rows import Row, ceilings, completed, make_row, read_rows

ROWS = "rows.jsonl"
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
WHOLE = "the part"
"""The case of a row that describes a whole part."""


def run_parts(
    parts: Sequence[Part],
    machine: Machine,
    *,
    folder: Path,
    budget: float,
    tiny: bool = False,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Run the parts. Return all rows, which are then also in ``folder/rows.jsonl``. A failed part has a row with the
    reason.

    Args:
        folder: exists, and has no rows yet.
        budget: seconds for all parts together. A part whose limit is longer than the rest of the budget is not started.
        say: gets a line before and after each part.
    """
    circumstances = {
        "date": time.strftime("%Y-%m-%d"),
        **{
            key: value
            for key, value in asdict(machine).items()
            if key in ("gpu", "cuda", "versions", "commit")
        },
        "command": " ".join(sys.argv),
    }
    rows: list[Row] = []
    begun = time.monotonic()
    for number, part in enumerate(parts, 1):
        left = budget - (time.monotonic() - begun)
        reason = _obstacle(part, machine, left)
        if reason is not None:
            found = [make_row(part.name, WHOLE, "not run", reason=reason)]
            say(f"[{number}/{len(parts)}] {part.name}: not run: {reason}")
        else:
            say(f"[{number}/{len(parts)}] {part.name}: {part.what} (at most {part.limit} s)")
            found = _run(part, folder, tiny)
            say(f"[{number}/{len(parts)}] {part.name}: {_outcome(found)}")
        bounds = ceilings([*rows, *found])
        found = [completed(row, bounds, circumstances) for row in found]
        with (folder / ROWS).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
    return rows


def _obstacle(part: Part, machine: Machine, left: float) -> str | None:
    lacking = machine.lacks(part.needs)
    if lacking:
        return f"needs {' and '.join(lacking)}"
    if part.limit > left:
        return f"it may take {part.limit} s, and {max(left, 0):.0f} s of the budget are left"
    return None


def _outcome(rows: Iterable[Row]) -> str:
    rows = list(rows)
    whole = next(row for row in rows if row["case"] == WHOLE)
    failed = sum(row["status"] == "failed" for row in rows)
    if whole["status"] == "failed":
        return f"failed: {whole['reason']}"
    return f"{whole['seconds']:.0f} s, {len(rows) - 1} rows" + (f", {failed} failed" if failed else "")


def _run(part: Part, folder: Path, tiny: bool) -> list[Row]:
    """Run a part. Return its rows, and one for the whole part."""
    own, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    command = [sys.executable, *part.command]
    if part.writes_rows:
        command += ["--rows", str(own), "--part", part.name, *["--tiny"] * tiny]
    if part.profiled:
        command += ["--profile", str(folder / f"{part.name}-profile.txt")]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | ENVIRONMENT | dict(part.environment) | {"PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    with log.open("wb") as output:
        code = _wait(command, environment, output.fileno(), part.limit)
    seconds = time.monotonic() - start
    rows = read_rows(own)
    reason = None
    if code is None:
        reason = f"stopped after its limit of {part.limit} s; {log.name} says how far it came"
    elif code:
        reason = f"exit {code}: {_last_error(log)}"
    status = "failed" if reason else "ok"
    return [*rows, make_row(part.name, WHOLE, status, reason=reason, seconds=seconds)]


def _wait(command: Sequence[str], environment: dict[str, str], output: int, limit: float) -> int | None:
    """Return the exit status. Return None if the process had to be stopped, with all processes that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_error(log: Path) -> str:
    """Return the last line of the log that looks like an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith(("E ", "FAILED"))]
    return (errors or lines or ["its log is empty"])[-1][:300]
