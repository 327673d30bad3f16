"""``megatron_chord.train(run)``: a training from a script or a notebook.

Its ranks are processes of their own, as `megatron-chord train` starts them. So a script needs no ``__main__`` guard,
and neither the libraries' state nor their memory stays behind in a notebook.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.config_io import dump_config
from megatron_chord.processes import PrivateFolder, die_with_parent
from megatron_chord.train.metrics import read_metrics

_SHOWN = 20
"""Last lines of a failed run that its error repeats."""


class RunFailed(RuntimeError):
    """A training ended with another exit code than 0 (docs/running.md lists them)."""

    def __init__(self, exit_code: int, told: str) -> None:
        super().__init__(f"the run ended with exit code {exit_code}{': ' if told else ''}{told}")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that has ended."""

    folder: Path
    """Of the run: checkpoints, samples, the report, policy/."""
    steps: list[dict[str, Any]]
    """A row for each training step, as in metrics.jsonl."""
    evaluations: list[dict[str, Any]]
    """A row for each evaluation: its `step`, and its `evaluation` with the accuracy."""

    @property
    def policy(self) -> Path:
        """The trained policy, a Hugging Face folder."""
        return self.folder / "policy"


def train(
    run: RunConfig, *, resume: str = "never", overwrite: bool = False, allow_changed: bool = False
) -> Trained:
    """Train, in processes of their own, and wait for the end. What they print appears here.

    The arguments are those of `megatron-chord train`. A KeyboardInterrupt asks the run for a checkpoint; it then ends
    with ``RunFailed``, whose exit code is 75. Main thread only: the run is killed when the thread that started it ends.

    Raises:
        RunFailed: settings or data are refused (exit code 2), or the run stopped.
    """
    options = ["--resume", resume] if resume != "never" else []
    options += ["--overwrite"] * overwrite + ["--allow-changed"] * allow_changed
    with contextlib.closing(PrivateFolder(Path(tempfile.gettempdir()))) as folder:
        settings = folder.path / "run.yaml"
        settings.write_text(dump_config(run), encoding="utf-8")
        _run([sys.executable, "-m", "megatron_chord.cli", "train", str(settings), *options])
    rows = read_metrics(run.output)
    return Trained(
        folder=run.output,
        steps=[row for row in rows if "evaluation" not in row],
        evaluations=[row for row in rows if "evaluation" in row],
    )


def _run(command: Sequence[str]) -> None:
    """Run a command to its end, and show what it prints: in a terminal as it is, elsewhere line by line."""
    in_terminal = sys.stdout is sys.__stdout__ and sys.stdout.isatty()
    process = subprocess.Popen(
        command,
        stdout=None if in_terminal else subprocess.PIPE,
        stderr=None if in_terminal else subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches it through this process alone, once
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    last: list[str] = []
    while True:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                last = [*last, line][-_SHOWN:]
            code = process.wait()
            break
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
    if code != 0:
        raise RunFailed(code, "".join(last).strip())
