"""A run of two ranks that is killed twice ends like an undisturbed run. ``benchmarks/kills.py`` does this with more
kills, and also kills the server. Steps go on while the killed run writes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_run import without_times
from tests.support.kills import Kill, run_through_kills
from tests.support.task import make_task, metrics_of

KILLS = (Kill("rank1", "saving", 0.01), Kill("launcher", "saved", 0.1))
SFT = ("parallel.ranks=2", "method.mu.peak=1.0")


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit_and_leaves_nothing(tmp_path: Path) -> None:
    config = make_task(tmp_path, steps=5, checkpoint={"every": 1, "keep": 2})
    straight, killed, temp = tmp_path / "straight", tmp_path / "killed", tmp_path / "temp"
    run_through_kills(config, straight, [], *SFT, temp=temp, looks_in_shared_memory=False)
    asynchronous = "checkpoint.asynchronous=true"
    report = run_through_kills(
        config, killed, KILLS, *SFT, asynchronous, temp=temp, looks_in_shared_memory=False
    )
    assert len(report.kills) == len(KILLS)
    assert report.survivors == []
    assert report.left == []
    assert without_times(metrics_of(killed)) == without_times(metrics_of(straight))
    policy = "policy/model.safetensors"
    assert (killed / policy).read_bytes() == (straight / policy).read_bytes()
