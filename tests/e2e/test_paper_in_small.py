"""``benchmarks/paper_in_small.py`` runs its smallest plan on real servers and ranks. The same command again resumes
it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import ROOT


def plan(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/paper_in_small.py", "--smallest", "--workers", "1"]
    return subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_smallest_plan_runs_and_keeps_its_results(tmp_path: Path) -> None:
    done = plan(tmp_path)
    assert done.returncode == 0, done.stderr
    results = sorted((tmp_path / "smallest" / "results").iterdir())
    assert [path.name for path in results] == ["chord_phi-0.json", "grpo-0.json"]
    for path in results:
        result = json.loads(path.read_text())
        assert [row["step"] for row in result["steps"]] == [0, 1]
        assert all("entropy" in row and row["logprob_gap"] < 1e-4 for row in result["steps"])
        assert [row["step"] for row in result["evaluations"]] == [0, 2]
        assert set(result["evaluations"][1]) == {"step", "first", "second", "transfer"}
    assert "| GRPO | 1 |" in done.stdout
    assert "**not run**" in done.stdout

    before = [path.stat().st_mtime_ns for path in results]
    again = plan(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "2 runs, 2 of them finished" in again.stderr
    assert [path.stat().st_mtime_ns for path in results] == before
    assert "| GRPO | 1 |" in again.stdout
