"""The limits of the watchdog: how long each phase of a run may take without progress.

They follow from the timeouts of the operations in the phase.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from megatron_chord.config import RunConfig
from megatron_chord.rewards.pool import longest_grading_s
from megatron_chord.rewards.table import terms_of
from megatron_chord.runtime.heartbeat import FOLDER_VARIABLE, Limits, Phase, Watch
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.folder import LOGS

_FOLDER = ".heartbeats"
_MARGIN_S = 60.0
"""Seconds added to a timeout of an operation, so that the operation's own error, which is more detailed, comes
first."""
_SLEEP_S = 300.0
"""Timeout of putting a server to sleep and of waking it (``RolloutClient``)."""
_SHARE = 0.9
"""Fraction of a collective's timeout. The collective's timeout would end the run, too, but without naming a rank."""


def start_watch(run: RunConfig, groups: ParallelGroups) -> Watch | None:
    """Start the watchdog on this rank; it also watches the other ranks. Called on every rank. None if
    ``watchdog.beat_s`` is 0."""
    if run.watchdog.beat_s == 0:
        return None
    # In a job of one rank, the program that started the rank reads its heartbeat (``cluster.stopped``).
    is_watched = groups.world_size > 1 or FOLDER_VARIABLE in os.environ
    folder = groups.once(lambda: _new_folder(run.output)) if is_watched else None
    return Watch(
        groups.pulse,
        limits_of(run, rank=groups.rank, world_size=groups.world_size),
        rank=groups.rank,
        world_size=groups.world_size,
        folder=folder,
        logs=run.output / LOGS,
    )


def limits_of(run: RunConfig, *, rank: int, world_size: int) -> Limits:
    """The limits of a rank's main thread. In phases in which ranks wait for rank 0, only rank 0 has a limit."""
    watchdog, timeouts = run.watchdog, run.timeouts
    grading = max(longest_grading_s(reward.timeout_s) for reward in terms_of(run.reward).values())
    sampling = max(timeouts.sampling_s, grading, _SLEEP_S) + _MARGIN_S
    phases: dict[Phase, float] = {
        "loading": watchdog.loading_s,
        "pushing": timeouts.server_start_s + timeouts.weight_push_s + 2 * _SLEEP_S + _MARGIN_S,
        "saving": watchdog.saving_s,
    }
    if rank == 0:
        phases |= {
            "collecting": sampling,
            "evaluating": sampling,
            "waiting for servers": timeouts.server_start_s + _MARGIN_S,
        }
    if watchdog.computing_s is not None:
        phases["computing"] = watchdog.computing_s
    elif world_size > 1:
        phases["computing"] = _SHARE * run.timeouts.collective_s
    return Limits(beat_s=watchdog.beat_s, silence_s=watchdog.silence_s, phases=phases)


def clear_leftovers(output: Path, watch: Watch | None) -> None:
    """Remove the watchdog files of killed runs. Call it only after this run has locked its folder."""
    for left in (output / _FOLDER).glob("*"):
        if watch is None or left != watch.folder:
            shutil.rmtree(left, ignore_errors=True)


def _new_folder(output: Path) -> Path:
    """The folder of the job, or a new folder with a unique name, because another run may use the run's folder by
    mistake."""
    job = os.environ.get(FOLDER_VARIABLE)
    return Path(job) if job else output / _FOLDER / uuid.uuid4().hex[:8]
