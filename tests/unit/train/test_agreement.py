"""When a step's rollouts are too far from what the trainer makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import RunConfig
from megatron_chord.train.agreement import LogprobMismatch, check_agreement, limits
from megatron_chord.train.step import UpdateResult
from tests.support.tiny import tiny_run


def run_of(folder: Path, precision: Any = None, dtype: Any = "bf16", **rollout: Any) -> RunConfig:
    run = tiny_run(folder)
    return replace(
        run,
        model=replace(run.model, dtype=dtype),
        rollout=replace(run.rollout, **rollout),
        precision=precision,
    )


def measured(gap: float, error: float) -> UpdateResult:
    return UpdateResult(
        loss=0.0, means={"logprob_gap": gap, "probability_error": error}, maxima={"logprob_gap_max": 1.0}
    )


def test_limits_by_precision(tmp_path: Path) -> None:
    assert limits(run_of(tmp_path, dtype="fp32"), age=0) == (1e-3, 1.01)
    assert limits(run_of(tmp_path), age=0) == (5e-2, 1.1)
    mixed = run_of(tmp_path, dtype="fp32")
    assert limits(replace(mixed, rollout=replace(mixed.rollout, dtype="bf16")), age=0) == (5e-2, 1.1)
    assert limits(run_of(tmp_path, "bf16"), age=0) == (5e-2, 1.1)
    for precision in ("fp8_rollout", "fp8_e2e", "fp8_tensorwise"):
        assert limits(run_of(tmp_path, precision), age=0) == (0.1, 1.1)
        assert limits(run_of(tmp_path, precision), age=1) == (0.5, None)
    own = run_of(tmp_path, "fp8_e2e", max_logprob_gap=0.2, max_probability_error=1.03)
    assert limits(own, age=0) == limits(own, age=1) == (0.2, 1.03)


def test_beyond_a_limit_nothing_is_trained(tmp_path: Path) -> None:
    run = run_of(tmp_path, "fp8_rollout")
    check_agreement(run, measured(0.09, 1.09), step=3, age=0)
    check_agreement(run, UpdateResult(loss=0.0, means={}, maxima={}), step=3, age=0)
    with pytest.raises(
        LogprobMismatch, match=r"step 3: .* log-probs .* by 1\.10e-01 .*max_logprob_gap is 1e-01"
    ):
        check_agreement(run, measured(0.11, 1.0), step=3, age=0)
    with pytest.raises(
        LogprobMismatch, match=r"by a factor of 1\.12 .*max_probability_error is 1\.1\. Nothing"
    ):
        check_agreement(run, measured(0.01, 1.12), step=3, age=0)
    check_agreement(run, measured(0.3, 9.0), step=3, age=1)
    with pytest.raises(LogprobMismatch):
        check_agreement(run, measured(float("nan"), 1.0), step=3, age=0)
    with pytest.raises(LogprobMismatch):
        check_agreement(run, measured(0.0, float("nan")), step=3, age=0)
