"""How long each phase of a run may take without progress, from the deadlines of what happens in it."""

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
"""Added to deadlines that end what they belong to with an error of its own, which says more."""
_SLEEP_S = 300.0
"""Of a server's falling asleep and waking up (``RolloutClient``)."""
_SHARE = 0.9
"""Of a collective's deadline, which would end the run as well, but without a name."""


def start_watch(run: RunConfig, groups: ParallelGroups) -> Watch | None:
    """Watch this rank, and from it the others; on every rank. None where ``watchdog.beat_s`` is 0."""
    if run.watchdog.beat_s == 0:
        return None
    folder = groups.once(lambda: _new_folder(run)) if groups.world_size > 1 else None
    return Watch(
        groups.pulse,
        limits_of(run, rank=groups.rank, world_size=groups.world_size),
        rank=groups.rank,
        world_size=groups.world_size,
        folder=folder,
        logs=run.output / LOGS,
    )


def limits_of(run: RunConfig, *, rank: int, world_size: int) -> Limits:
    """The limits of a rank's main thread. Where ranks only wait for rank 0, they have none: rank 0 has."""
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


def clear_leftovers(run: RunConfig, watch: Watch | None) -> None:
    """Remove what killed runs have left of their watches. Only once this run has claimed its folder."""
    for left in (run.output / _FOLDER).glob("*"):
        if watch is None or left != watch.folder:
            shutil.rmtree(left, ignore_errors=True)


def _new_folder(run: RunConfig) -> Path:
    """A job's own; or one with a name like no other, since another run may be using the run's folder by mistake."""
    job = os.environ.get(FOLDER_VARIABLE)
    return Path(job) if job else run.output / _FOLDER / uuid.uuid4().hex[:8]
