"""The run's folder: the names of its files, and a lock so that no other run writes to it."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Self

from megatron_chord.config import RunConfig
from megatron_chord.config_io import dump_config
from megatron_chord.files import lock_if_possible
from megatron_chord.report.folder import CONFIG
from megatron_chord.report.page import REPORT
from megatron_chord.train.health import FOLDER as NONFINITE
from megatron_chord.train.metrics import DROPPED, METRICS, SAMPLES
from megatron_chord.train.segments import SEGMENTS, write_settings
from megatron_chord.train.trace import TRACES
from megatron_chord.train.trackers import TENSORBOARD

Resume = str
"""``never``, ``auto`` (the newest complete checkpoint) or the name of a checkpoint, such as ``step-000040``."""
POLICY = "policy"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
"""File in ``CHECKPOINTS`` with the name of the newest checkpoint."""
LOGS = "logs"
_OWN = (METRICS, SAMPLES, TENSORBOARD, TRACES, DROPPED)
"""Files that a run makes before all of its settings are checked. They are removed if the run is refused."""
_OF_A_RUN = (CONFIG, SEGMENTS, CHECKPOINTS, POLICY, NONFINITE, REPORT, *_OWN)
"""All files of a run, except logs."""
_FORMER_LIFE_S = 60.0


class Claim:
    """A run folder that is locked for this run until ``__exit__``.

    If the run is refused before ``begin``, the files that it made are removed again, except logs.
    """

    def __init__(self, run: RunConfig, lock: IO[str], *, replaces: bool) -> None:
        """``replaces``: whether the files of an earlier run are removed when this one begins."""
        self.folder = run.output
        self._run = run
        self._lock = lock
        self._replaces = replaces
        self.has_begun = False
        self._earlier = {path.name for path in run.output.iterdir()}

    def begin(self, *, first_step: int = 0) -> None:
        """Keep the files, because the run was not refused. The run continues after ``first_step`` training steps."""
        self.has_begun = True
        if self._replaces:
            _remove(self._run.output / name for name in _OF_A_RUN)
        write_settings(self._run.output, dump_config(self._run), first_step=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.has_begun:
            _remove(self._run.output / name for name in _OWN if name not in self._earlier)
            with contextlib.suppress(OSError):
                (
                    self._run.output / LOGS
                ).rmdir()  # if the folder is not empty, this fails and the folder stays
        self._lock.close()


def claim(run: RunConfig, *, resume: Resume, overwrite: bool, notify: Callable[[str], None] = print) -> Claim:
    """Lock the run folder. The lock is released when the process ends for any reason. ``notify`` gets a line if the
    file system has no locks.

    Raises:
        ValueError: another run is writing to the folder, or it has a run that is neither continued nor replaced.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    lock = (run.output / ".lock").open("w")
    # When a run is continued, its previous process may still be ending on a node that was lost.
    deadline = time.monotonic() + (_FORMER_LIFE_S if resume != "never" else 0.0)
    while True:
        try:
            if not lock_if_possible(lock.fileno()):
                notify(f"{run.output} has no file locks: a second run that writes there is not noticed")
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ValueError(f"another run is writing to {run.output}") from None
            time.sleep(0.5)
    holds_a_run = (run.output / CONFIG).exists() and resume == "never"
    if holds_a_run and not overwrite:
        raise ValueError(
            f"{run.output} already has a run: choose another output, continue it with --resume auto, "
            "or replace it with --overwrite"
        )
    if holds_a_run:
        _remove([run.output / LOGS])  # the new run's servers write their logs before `begin`
    claimed = Claim(run, lock, replaces=holds_a_run)
    (run.output / LOGS).mkdir(exist_ok=True)
    return claimed


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
