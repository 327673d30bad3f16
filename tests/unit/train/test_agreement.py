"""The check fails when the log-probs of a step's rollouts differ too much from the trainer's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import RunConfig
from megatron_chord.losses.policy import comparison
from megatron_chord.losses.terms import TokenStats
from megatron_chord.train.agreement import Limits, LogprobMismatch, check_agreement, limits, mean_and_error
from megatron_chord.train.update import UpdateResult
from tests.support.tiny import tiny_run


def run_with_precision(folder: Path, precision: Any = None, dtype: Any = "bf16", **rollout: Any) -> RunConfig:
    run = tiny_run(folder)
    return replace(
        run,
        model=replace(run.model, dtype=dtype),
        rollout=replace(run.rollout, **rollout),
        precision=precision,
    )


def measured(gaps: Sequence[float], logit: float = 0.0) -> UpdateResult:
    """Measurements of tokens whose log-probs differ by ``gaps``."""
    ours = torch.full((len(gaps),), -20.0, dtype=torch.float64)
    stats = TokenStats(ours, ours, None, torch.full_like(ours, -logit))
    sums = comparison(stats, ours + torch.tensor(gaps, dtype=torch.float64))
    compared = {name: values.sum().item() for name, values in sums.items()}
    return UpdateResult(loss=0.0, means={}, maxima={"logprob_gap_max": max(gaps)}, compared=compared)


def spread(mean: float, tokens: int) -> list[float]:
    """Gaps with this mean. Half of them are 0, so their standard deviation equals the mean."""
    return [0.0, 2 * mean] * (tokens // 2)


def close(found: Limits, gap: float, factor: float | None) -> bool:
    return (found.gap, found.factor) == (
        pytest.approx(gap),
        None if factor is None else pytest.approx(factor),
    )


def test_limits_by_precision(tmp_path: Path) -> None:
    assert close(limits(run_with_precision(tmp_path, dtype="fp32"), age=0, logit=24.0), 1e-3, 0.01)
    assert close(limits(run_with_precision(tmp_path), age=0, logit=0.0), 5e-2, 0.1)
    mixed = run_with_precision(tmp_path, dtype="fp32")
    half = replace(mixed, rollout=replace(mixed.rollout, dtype="bf16"))
    assert close(limits(half, age=0, logit=0.0), 5e-2, 0.1)
    for precision in ("fp8_rollout", "fp8_e2e", "fp8_tensorwise"):
        assert close(limits(run_with_precision(tmp_path, precision), age=0, logit=0.0), 0.1, 0.1)
        assert close(limits(run_with_precision(tmp_path, precision), age=1, logit=0.0), 0.5, None)
    own = run_with_precision(tmp_path, "fp8_e2e", max_logprob_gap=0.2, max_probability_error=1.03)
    for age in (0, 1):
        assert close(limits(own, age=age, logit=24.0), 0.2, 0.03), "what the user has set is taken as it is"


def test_rounding_of_logits_is_what_bf16_makes_of_them(tmp_path: Path) -> None:
    """Two engines round the same logits to BF16 after errors of their own. The allowance covers their gap."""
    generator = torch.Generator().manual_seed(0)
    allowance = limits(run_with_precision(tmp_path), age=0, logit=24.0).gap - 5e-2
    logits = 16 + 16 * torch.rand(100_000, generator=generator, dtype=torch.float64)
    noise = 0.2 * torch.randn(2, len(logits), generator=generator, dtype=torch.float64)
    rounded = (logits + noise).bfloat16().double() - noise
    found = (rounded[0] - rounded[1]).abs().mean().item()
    assert found == pytest.approx(0.125 / 3, rel=0.02)
    assert found <= allowance <= 2 * found


def test_mean_and_standard_error() -> None:
    gaps = [0.1, 0.4, 0.2, 0.9]
    mean, error = mean_and_error(measured(gaps).compared, "gap", spread=0.05)
    assert mean == pytest.approx(statistics.fmean(gaps))
    assert error == pytest.approx(math.sqrt((statistics.variance(gaps) + 0.05**2) / 4))
    factors = [math.exp(gap) - 1 for gap in gaps]
    mean, error = mean_and_error(measured(gaps).compared, "factor", spread=0.1)
    assert mean == pytest.approx(statistics.fmean(factors))
    assert error == pytest.approx(math.sqrt((statistics.variance(factors) + 0.1**2) / 4))


def test_what_a_few_tokens_show_is_not_enough_to_stop(tmp_path: Path) -> None:
    """The case that was seen: a mean gap of 0.113 over 19 to 36 tokens in BF16, with a model whose weights were
    right."""
    run = run_with_precision(tmp_path)
    for tokens in (20, 36):
        check_agreement(run, measured(spread(0.113, tokens), logit=20.0), step=2, age=0)
    with pytest.raises(LogprobMismatch, match="the same 2000 tokens"):
        check_agreement(run, measured(spread(0.13, 2000), logit=20.0), step=2, age=0)
    # With so few tokens, only a gap beyond all doubt stops the run.
    check_agreement(run, measured([0.19]), step=2, age=0)
    check_agreement(run, measured([0.11, 0.11]), step=2, age=0)
    with pytest.raises(LogprobMismatch):
        check_agreement(run, measured(spread(3.0, 20)), step=2, age=0)


def test_beyond_a_limit_nothing_is_trained(tmp_path: Path) -> None:
    run = run_with_precision(tmp_path, "fp8_rollout")
    check_agreement(run, measured([0.09] * 500), step=3, age=0)
    check_agreement(run, UpdateResult(loss=0.0, means={}, maxima={}), step=3, age=0)
    message = (
        r"^step 3: trainer and rollout log-probs of the same 500 tokens differ by 1\.50e-01 \+- 4\.5e-03 on average "
        r"\(largest log-prob difference 1\.50e-01, mean logit size 0\.0\)\. The limit is 1\.00e-01, plus 3 standard "
        r"errors \(rollout\.max_logprob_gap\)\. These tokens were not trained$"
    )
    with pytest.raises(LogprobMismatch, match=message):
        check_agreement(run, measured([0.15] * 500), step=3, age=0)
    loose = run_with_precision(tmp_path, "fp8_rollout", max_logprob_gap=1.0)
    with pytest.raises(
        LogprobMismatch, match=r"probabilities .* factor of 1\.162 .*rollout\.max_probability_error"
    ):
        check_agreement(loose, measured([0.15] * 500), step=3, age=0)
    check_agreement(run, measured([0.3] * 500), step=3, age=1)
    with pytest.raises(LogprobMismatch, match=r"tokens, 1 steps old, differ"):
        check_agreement(run, measured([0.6] * 500), step=3, age=1)
    for broken in (math.nan, math.inf):
        with pytest.raises(LogprobMismatch):
            check_agreement(run, measured([0.0] * 499 + [broken]), step=3, age=0)


def test_one_wild_token_among_many_does_not_stop(tmp_path: Path) -> None:
    """Without the limit on a token's factor, e^19 for one of 50000 tokens would give a mean of 3600."""
    for dtype in ("fp32", "bf16"):
        for tokens in (100, 50_000):
            check_agreement(
                run_with_precision(tmp_path, dtype=dtype), measured([1e-5] * tokens + [19.0]), step=3, age=0
            )
