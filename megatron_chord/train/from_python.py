"""``megatron_chord.train(run)``: starts a training from a script or a notebook.

The ranks are separate processes, as with `megatron-chord train`. So a script needs no ``__main__`` guard, and the
training leaves no state and no memory of libraries in a notebook.
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
"""Number of last lines of a failed run that the error message repeats."""


class RunFailed(RuntimeError):
    """A training ended with an exit code other than 0 (docs/running.md lists them)."""

    def __init__(self, exit_code: int, output: str) -> None:
        super().__init__(f"the run ended with exit code {exit_code}{': ' if output else ''}{output}")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that has ended."""

    folder: Path
    """Output folder of the run, with checkpoints, samples, the report and policy/."""
    steps: list[dict[str, Any]]
    """One row for each training step, as in metrics.jsonl."""
    evaluations: list[dict[str, Any]]
    """One row for each evaluation: `step`, and `evaluation`, which contains the accuracy, or with `evaluation.sets` the
    accuracy and the metrics of each set by its name."""

    @property
    def policy(self) -> Path:
        """The Hugging Face folder of the trained policy."""
        return self.folder / "policy"


def train(
    run: RunConfig, *, resume: str = "never", overwrite: bool = False, allow_changed: bool = False
) -> Trained:
    """Train in separate processes and wait for their end. Their output is printed here.

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
    """Run a command to its end and print its output: unchanged in a terminal, otherwise line by line."""
    in_terminal = sys.stdout is sys.__stdout__ and sys.stdout.isatty()
    process = subprocess.Popen(
        command,
        stdout=None if in_terminal else subprocess.PIPE,
        stderr=None if in_terminal else subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that it gets Ctrl-C only once, from this process
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
