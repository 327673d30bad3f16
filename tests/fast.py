"""The tests of `make test-fast`: the unit tests, except slow ones, and one layout of each kind of parallelism.

python -m tests.fast              run them
python -m tests.fast --list       only print which tests run and which files are left out
python -m tests.fast --workers    only print how many of them run at a time
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNIT = "tests/unit"
WORKERS = min(2 * (os.cpu_count() or 1), 16)
"""Number of unit tests that run at a time. Each core has two, because they often wait."""
LAYOUTS: dict[str, str] = {
    "tensor, sequence, pipeline, virtual pipeline, context and data parallel, each over 2 ranks": (
        "tests/distributed/test_split_invariance.py::test_every_layout_computes_the_reference_step[untied-2]"
    ),
    "expert parallel over 2 ranks": (
        "tests/distributed/test_families.py::test_a_step_of_chord_is_the_references[mixtral_untied]"
    ),
    "logits and gradients of one rank are those of examples/one_file/chord.py": (
        "tests/distributed/test_one_file.py::test_every_layout_computes_what_the_one_file_says[1]"
    ),
}
"""Tests outside tests/unit that run, too, by what they show."""


def left_out() -> dict[str, list[str]]:
    """Folder -> the test files in it that do not run, or of which only the tests in ``LAYOUTS`` run."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("*/**/test_*.py")):
        folder = path.parent.relative_to(ROOT).as_posix()
        if not f"{folder}/".startswith(f"{UNIT}/"):
            found.setdefault(folder, []).append(path.name)
    return found


def slow_units() -> list[str]:
    """The unit tests that are marked as slow."""
    return [
        f"{path.relative_to(ROOT)}::{name}"
        for path in sorted((ROOT / UNIT).glob("**/test_*.py"))
        for name in re.findall(r"^@pytest\.mark\.slow\ndef (\w+)", path.read_text(), re.MULTILINE)
    ]


def describe() -> str:
    partly = {test.partition("::")[0] for test in LAYOUTS.values()}
    lines = [f"runs: {UNIT}, except what is marked as slow"]
    lines += [f"runs: {what}" for what in LAYOUTS]
    lines += [f"left out: {test}" for test in slow_units()]
    for folder, names in left_out().items():
        marked = [f"{name} (in part)" if f"{folder}/{name}" in partly else name for name in names]
        lines.append(f"left out: {folder}: {', '.join(marked)}")
    return "\n".join([*lines, "`make test` runs everything."])


def main() -> int:
    if "--list" in sys.argv[1:]:
        print(describe())
        return 0
    if "--workers" in sys.argv[1:]:
        print(WORKERS)
        return 0
    # The layouts take the longest, so they come first.
    workers = ["-n", str(WORKERS)]
    command = [sys.executable, "-m", "pytest", "-q", *workers, "-m", "not slow", *LAYOUTS.values(), UNIT]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(describe())
    return code


if __name__ == "__main__":
    sys.exit(main())
