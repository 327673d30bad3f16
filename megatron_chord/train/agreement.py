"""Check that trainer and rollout engine give the same tokens the same probability, before the step trains on them.

The check uses the tokens of one step only. If the tokens of a step have no advantage, enough of them are kept in its
forward pass for the check (``drop_zero_gradient_parts``). A mean over n tokens has a standard error s. The run stops
only if mean - SURE x s exceeds the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_chord.config import RunConfig
from megatron_chord.precision import preset
from megatron_chord.train.update import UpdateResult

Format = Literal["fp32", "bf16", "fp8"]
_MAX_GAP: dict[Format, float] = {"fp32": 1e-3, "bf16": 5e-2, "fp8": 0.1}
_MAX_STALE_GAP = 0.5
_MAX_PROBABILITY_ERROR: dict[Format, float] = {"fp32": 1.01, "bf16": 1.1, "fp8": 1.1}
"""Default limits. NVIDIA recommends 1.03 to 1.05 for FP8 runs, and its tests pass up to 1.1."""
SURE = 3.0
"""Number of standard errors by which a mean must exceed its limit."""
_BF16_ROUNDING = 2.0**-7 / 3
"""Mean difference of two engines that both round a logit to bf16, as a fraction of the logit's absolute value. Bf16
numbers between 2^k and 2^(k+1) have the spacing 2^(k-7) (0.125 from 16 to 32). Each engine's error is uniform within
half a spacing on either side. The mean absolute difference of two such errors is a third of the spacing."""


class LogprobMismatch(RuntimeError):
    """Trainer and rollout engine disagree on the probability of the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of means over tokens; see ``losses.policy.comparison``."""

    gap: float
    """Limit of the mean |difference of the log-probs|."""
    factor: float | None
    """Limit of the mean (ratio of the larger to the smaller probability - 1). None: no limit."""


def check_agreement(run: RunConfig, result: UpdateResult, *, step: int, age: int) -> None:
    """Compare the log-probs of trainer and rollout engine before the step's first update.

    A gap means wrong weights, a wrong temperature or misaligned log-probs. Rollouts that are ``age`` > 0 steps old also
    differ because the policy has changed since; beyond a limit importance correction cannot help.

    Raises:
        LogprobMismatch: the mean gap, or the mean ratio of the probabilities, exceeds its limit by ``SURE`` standard
            errors.
    """
    sums, tokens = result.compared, round(result.compared.get("tokens", 0.0))
    if tokens == 0:
        return
    logit = sums["logit"] / tokens
    found = limits(run, age=age, logit=logit)
    older = f", {age} steps old," if age else ""
    message = (
        f"step {step}: trainer and rollout {{}} of the same {tokens} tokens{older} differ {{}} on average "
        f"(largest log-prob difference {result.maxima.get('logprob_gap_max', math.nan):.2e}, mean logit size "
        f"{logit:.1f}). "
        "The limit is {}. These tokens were not trained"
    )
    mean, error = mean_and_error(sums, "gap", spread=found.gap)
    if not mean - SURE * error <= found.gap:
        raise LogprobMismatch(
            message.format(
                "log-probs",
                f"by {mean:.2e} +- {error:.1e}",
                f"{found.gap:.2e}, plus {SURE:.0f} standard errors (rollout.max_logprob_gap)",
            )
        )
    if found.factor is None:
        return
    mean, error = mean_and_error(sums, "factor", spread=found.factor)
    if not mean - SURE * error <= found.factor:
        raise LogprobMismatch(
            message.format(
                "probabilities",
                f"by a factor of {1 + mean:.4g} +- {error:.1e}",
                f"{1 + found.factor:.4g}, plus {SURE:.0f} standard errors (rollout.max_probability_error)",
            )
        )


def mean_and_error(sums: Mapping[str, float], name: str, *, spread: float) -> tuple[float, float]:
    """The mean over ``sums["tokens"]`` > 0 tokens, and its standard error: sqrt((s^2 + spread^2) / tokens).

    s^2 is the unbiased variance over the tokens. ``spread`` is added because the variance of a few tokens can be far
    too small: it is 0 for two equal ones.
    """
    tokens = sums["tokens"]
    mean = sums[name] / tokens
    variance = max(0.0, (sums[f"{name}_squared"] - tokens * mean**2) / max(tokens - 1, 1))
    return mean, math.sqrt((variance + spread**2) / tokens)


def limits(run: RunConfig, *, age: int, logit: float) -> Limits:
    """The limits for rollouts that are ``age`` steps old.

    In bf16 and FP8 the default limits include the rounding error of logits, whose mean absolute value is ``logit``.
    Limits that the user has set are not changed.
    """
    kind: Format = "fp32"
    if "bf16" in (run.model.dtype, run.rollout.dtype):
        kind = "bf16"
    if preset(run.precision).rollouts is not None:
        kind = "fp8"
    rounding = 0.0 if kind == "fp32" else _BF16_ROUNDING * logit
    max_gap, max_error = run.rollout.max_logprob_gap, run.rollout.max_probability_error
    gap = max_gap if max_gap is not None else (_MAX_GAP[kind] if age == 0 else _MAX_STALE_GAP) + rounding
    if max_error is not None:
        return Limits(gap=gap, factor=max_error - 1)
    return Limits(gap=gap, factor=_MAX_PROBABILITY_ERROR[kind] - 1 + rounding if age == 0 else None)
