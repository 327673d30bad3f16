"""Whether trainer and rollout engine give the same tokens the same probability, checked before training on them."""

from __future__ import annotations

from typing import Literal

from megatron_chord.config import RunConfig
from megatron_chord.precision import preset
from megatron_chord.train.step import UpdateResult

Format = Literal["fp32", "bf16", "fp8"]
_MAX_GAP: dict[Format, float] = {"fp32": 1e-3, "bf16": 5e-2, "fp8": 0.1}
_MAX_STALE_GAP = 0.5
_MAX_PROBABILITY_ERROR: dict[Format, float] = {"fp32": 1.01, "bf16": 1.1, "fp8": 1.1}
"""NVIDIA asks FP8 runs for 1.03 to 1.05 and lets its tests pass up to 1.1."""


class LogprobMismatch(RuntimeError):
    """Trainer and rollout engine disagree on the probability of the same tokens."""


def check_agreement(run: RunConfig, result: UpdateResult, *, step: int, age: int) -> None:
    """Before the update: a gap means wrong weights, wrong temperature or a shifted log-prob somewhere.

    Rollouts that are ``age`` > 0 steps old differ because the policy has moved; too far, and no correction helps.

    Raises:
        LogprobMismatch: the mean gap, or the mean factor between the probabilities, is beyond its limit.
    """
    gap, error = result.means.get("logprob_gap"), result.means.get("probability_error")
    max_gap, max_error = limits(run, age=age)
    told = f"step {step}: trainer and rollout {{}} of the same tokens{f', {age} steps old,' if age else ''} differ "
    if gap is not None and not gap <= max_gap:
        raise LogprobMismatch(
            f"{told.format('log-probs')}by {gap:.2e} on average (at most {result.maxima['logprob_gap_max']:.2e}); "
            f"rollout.max_logprob_gap is {max_gap:.0e}. Nothing was trained on them"
        )
    if error is not None and max_error is not None and not error <= max_error:
        raise LogprobMismatch(
            f"{told.format('probabilities')}by a factor of {error:.4g} on average; rollout.max_probability_error is "
            f"{max_error:.4g}. Nothing was trained on them"
        )


def limits(run: RunConfig, *, age: int) -> tuple[float, float | None]:
    """Of the mean gap and of the mean factor for rollouts ``age`` steps old; no limit of the latter is None."""
    kind: Format = "fp32"
    if "bf16" in (run.model.dtype, run.rollout.dtype):
        kind = "bf16"
    if preset(run.precision).rollouts is not None:
        kind = "fp8"
    max_gap, max_error = run.rollout.max_logprob_gap, run.rollout.max_probability_error
    if max_gap is None:
        max_gap = _MAX_GAP[kind] if age == 0 else _MAX_STALE_GAP
    if max_error is None and age == 0:
        max_error = _MAX_PROBABILITY_ERROR[kind]
    return max_gap, max_error
