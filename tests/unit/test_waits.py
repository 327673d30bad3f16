"""``tests/waits.py`` tells waiting from computing, also in a test's child processes, and names the line that waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import subprocess, sys, time

def test_waits():
    time.sleep(2)

def test_computes():
    spin = "import time\\nwhile time.process_time() < 1.5: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
"""


def test_idle_time_and_cpu_time_of_each_test(tmp_path: Path) -> None:
    file = tmp_path / "test_two.py"
    file.write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.waits", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        words[3].partition("::")[2]: words
        for line in done.stdout.splitlines()
        if len(words := line.split()) > 3
    }
    wall_s, cpu_s, idle_s = map(float, rows["test_waits"][:3])
    assert wall_s >= idle_s > 1
    assert cpu_s < 0.5
    assert rows["test_waits"][4].startswith("test_two.py:5(")
    wall_s, cpu_s, idle_s = map(float, rows["test_computes"][:3])
    assert cpu_s > 1
    assert idle_s < wall_s / 2
