"""The tool-call grader agrees with BFCL's own checker on every twentieth row. The benchmark takes every row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = Path(os.environ.get("MEGATRON_CHORD_BFCL", Path(sys.prefix) / "bfcl"))


@pytest.mark.skipif(
    not PACKAGE.is_dir(),
    reason=f"no {PACKAGE}: make test puts bfcl-eval there, or name its folder in MEGATRON_CHORD_BFCL",
)
def test_grades_are_those_of_the_leaderboards_checker() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bfcl_agreement.py"), str(PACKAGE), "--every", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 disagreements without a listed reason" in done.stdout
    assert int(done.stdout.splitlines()[-1].partition(" ")[0]) > 4000  # replies
