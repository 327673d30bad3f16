"""Describes how a resumed run's learning rate changes if its number of steps or its decay steps changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.train.segments import horizon
from megatron_chord.train.state import learning_rate_at


def schedule_change(before: Mapping[str, Any], run: RunConfig, *, step: int, since: int = 0) -> str | None:
    """A sentence that compares the old and the new learning rate of the next step. None if the schedule ends at the
    same step as before.

    Args:
        before: the settings of the segment that is continued; empty if they are not known.
        run: the settings of the new segment.
        step: how many steps are done.
        since: the step at which the schedule was restarted last.
    """
    optim, old = run.optim, horizon(before)
    new = optim.horizon(run.steps)
    if old is None or optim.schedule == "constant" or old == new:
        return None
    past = replace(optim, decay_steps=max(old, optim.warmup_steps + 1))
    rates = [
        learning_rate_at(settings, steps=run.steps, step=step, since=since) for settings in (past, optim)
    ]
    keep = f"optim.decay_steps={old}"
    if old < run.steps and optim.min_lr == 0:
        keep += f" and optim.min_lr=RATE, a rate above 0 for the steps after {old}"
    return (
        f"optim.schedule {optim.schedule} now decays until step {new}, not {old}: the learning rate of step "
        f"{step + 1} is {rates[1]:.3g}, not {rates[0]:.3g}. To keep the old schedule: {keep}"
    )
