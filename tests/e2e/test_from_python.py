"""A training from a plain script, without a ``__main__`` guard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.task import cli_environment, make_task

SCRIPT = """
import sys
from pathlib import Path
import megatron_chord
from megatron_chord import RunFailed, load_config, train

changes = ["method.mu=1", "data.evaluation=null", "steps=2", "tracking=[]"]
run = load_config(Path(sys.argv[1]), changes)
result = train(run)
print("RESULT", [row["step"] for row in result.steps], result.evaluations, result.policy.is_dir(), train.__name__)
print("HEAVY", sorted({"torch", "megatron"} & set(sys.modules)))
try:
    train(run)
except RunFailed as error:
    print("REFUSED", error.exit_code, "--overwrite" in str(error))
"""


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(make_task(tmp_path))],
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}
    assert told["RESULT"] == "[0, 1] [] True megatron_chord.train"
    assert told["HEAVY"] == "[]"
    assert told["REFUSED"] == "2 True"
    assert "step 2/2" in done.stdout
