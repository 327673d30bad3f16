"""Training from Python works in the cells of the example notebook and in a plain script without a ``__main__``
guard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.ranks import ROOT
from tests.support.task import cli_environment

NOTEBOOK = ROOT / "examples" / "notebook" / "quick_start.ipynb"
SMALL = (
    "steps=2",
    "optim.warmup_steps=0",
    "evaluation.every=2",
    "evaluation.problems=8",
    "batch.prompts=4",
    "batch.demonstrations=4",
)
AFTER_TRAINING = """
import sys
print("HEAVY", sorted({"torch", "megatron"} & set(sys.modules)))
print("RESULT", [row["step"] for row in result.steps], [row["step"] for row in result.evaluations], train.__name__)
"""
AFTER_ALL = """
print("SAME", [row["response"] for row in answers][0] == greedy)
try:
    train(run)
except RunFailed as error:
    print("REFUSED", error.exit_code, "--overwrite" in str(error))
"""


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_holds_no_output() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())
    names = [cell["id"] for cell in cells()]
    assert len(set(names)) == len(names)


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in cells() if cell["cell_type"] == "code"]


def test_the_cells_of_the_notebook_run_in_one_process(tmp_path: Path) -> None:
    """The cells run as a script without a guard, in the notebook's folder, with fewer steps. Ranks and server are
    real."""
    parts = {cell["id"]: "".join(cell["source"]) for cell in code_cells()}
    parts["settings"] += f"\nchanges += {[f'output={tmp_path}/run', *SMALL]!r}"
    parts["train"] += AFTER_TRAINING
    script = tmp_path / "script.py"
    script.write_text("\n".join([*parts.values(), AFTER_ALL]))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=NOTEBOOK.parent,
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}
    assert told["RESULT"] == "[0, 1] [0, 2] megatron_chord.train"
    assert told["HEAVY"] == "[]"
    assert told["REFUSED"] == "2 True"
    assert told["SAME"] == "True"
    for text in ("exit code 2: ", "100000", "step 2/2", "after  2 steps: accuracy 0.", "report: "):
        assert text in done.stdout, text
