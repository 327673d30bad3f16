"""The run's folder: what lies where in it, and that no other run writes there."""

from __future__ import annotations

import fcntl
import shutil
import time
from typing import Any, Literal

from megatron_chord.config import RunConfig
from megatron_chord.config_io import dump_config
from megatron_chord.train.health import FOLDER as NONFINITE
from megatron_chord.train.metrics import METRICS, SAMPLES, TENSORBOARD
from megatron_chord.train.trace import TRACES

Resume = Literal["never", "auto"]
POLICY = "policy"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
CONFIG = "config.yaml"
_FORMER_LIFE_S = 60.0


def claim(run: RunConfig, *, resume: Resume, overwrite: bool) -> Any:
    """Make the run folder ours, or say why not. The lock goes with the process, however it ends."""
    run.output.mkdir(parents=True, exist_ok=True)
    lock = (run.output / ".lock").open("w")
    # A run that continues may find its former life still ending, on a node that was lost.
    deadline = time.monotonic() + (_FORMER_LIFE_S if resume == "auto" else 0.0)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ValueError(f"another run is writing to {run.output}") from None
            time.sleep(0.5)
    if (run.output / CONFIG).exists() and resume == "never":
        if not overwrite:
            raise ValueError(
                f"{run.output} already holds a run: choose another output, continue it with --resume auto, "
                "or replace it with --overwrite"
            )
        for name in (METRICS, SAMPLES, TENSORBOARD, CHECKPOINTS, LOGS, TRACES, POLICY, NONFINITE):
            path = run.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (run.output / LOGS).mkdir(exist_ok=True)
    (run.output / CONFIG).write_text(dump_config(run), encoding="utf-8")
    return lock
