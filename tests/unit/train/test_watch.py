"""The watchdog's limits of a run's phases, compared with hand arithmetic from its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_chord.config import TimeoutsConfig, WatchdogConfig
from megatron_chord.train.watch import limits_of
from tests.support.tiny import tiny_run


def test_a_limit_is_longer_than_the_deadlines_within_it(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    run = replace(
        run,
        timeouts=TimeoutsConfig(
            collective_s=100.0, sampling_s=1000.0, server_start_s=200.0, weight_push_s=50.0
        ),
    )
    limits = limits_of(run, rank=0, world_size=2)
    assert (limits.beat_s, limits.silence_s) == (5.0, 120.0)
    assert limits.phases == {
        "loading": 3600.0,
        "waiting for servers": 260.0,
        "pushing": 200.0 + 50.0 + 2 * 300.0 + 60.0,
        "collecting": 1060.0,
        "evaluating": 1060.0,
        "computing": 90.0,
        "saving": 3600.0,
    }
    others = limits_of(run, rank=1, world_size=2).phases
    assert set(limits.phases) - set(others) == {"collecting", "evaluating", "waiting for servers"}


def test_a_run_of_one_rank_may_compute_as_long_as_it_likes(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    assert "computing" not in limits_of(run, rank=0, world_size=1).phases
    run = replace(run, watchdog=WatchdogConfig(computing_s=7.0))
    assert limits_of(run, rank=0, world_size=1).phases["computing"] == 7.0


def test_silence_s_must_be_at_least_two_beats() -> None:
    with pytest.raises(ValueError, match="at least two beats, 2 x beat_s = 10, got 9"):
        WatchdogConfig(silence_s=9.0)
    WatchdogConfig(beat_s=0.0)
