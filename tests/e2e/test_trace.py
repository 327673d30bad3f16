"""A requested trace contains the requested steps, and a run without a request writes no trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_chord.config_io import load_config
from tests.support.ranks import run_ranks
from tests.support.task import make_task


def train_on_cpu(config: Path, output: Path, trace_steps: int) -> None:
    from megatron_chord.train.loop import train

    overrides = [f"output={output}", f"trace_steps={trace_steps}", "steps=5", "method.mu.peak=1"]
    train(load_config(config, [*overrides, "data.evaluation=null"]))


@pytest.mark.parametrize(("count", "traced"), [(2, {2, 3}), (9, {2, 3, 4})])
def test_the_steps_after_the_warm_up_are_traced(tmp_path: Path, count: int, traced: set[int]) -> None:
    run_ranks(train_on_cpu, 2, make_task(tmp_path), tmp_path / "run", count)
    files = sorted((tmp_path / "run" / "traces").iterdir())
    assert [file.name for file in files] == ["rank-0.json.gz", "rank-1.json.gz"]
    for file in files:
        with gzip.open(file, "rt") as text:
            events = [event["name"] for event in json.load(text)["traceEvents"]]
        steps = [name for name in events if name.startswith("step ")]
        assert sorted(steps) == [f"step {step}" for step in sorted(traced)]
        assert events.count("train") == len(traced)
        assert "aten::mm" in events


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    run_ranks(train_on_cpu, 1, make_task(tmp_path), tmp_path / "run", 0)
    assert not (tmp_path / "run" / "traces").exists()
