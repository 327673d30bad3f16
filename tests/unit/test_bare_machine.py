"""On a machine with only torch, Megatron-Core and pytest, tests for GPUs are skipped with a reason and do not fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_gpu_tests_are_collected_and_skipped_without_vllm() -> None:
    """Every module is imported. A test that would start a server says why it is skipped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.bare",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
    ]
    done = subprocess.run(
        [*command, "tests/gpu", "tests/rollout", "-k", "arrive"],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs vLLM" in done.stdout, done.stdout
    *_, outcome = done.stdout.splitlines()
    assert re.fullmatch(r"=+ \d+ skipped, \d+ deselected in .*=+", outcome), done.stdout
