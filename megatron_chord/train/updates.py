"""All updates of one step, after a last look at the rollouts: do trainer and rollout engine agree on them?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.state import TrainState
from megatron_chord.train.step import (
    Terms,
    UpdateResult,
    apply_gradients,
    compute_gradients,
    mean_result,
    prepare_batches,
)

_MAX_GAP = {"fp32": 1e-3, "bf16": 5e-2}
_MAX_STALE_GAP = 0.5
"""Of rollouts of older weights. Weights of importance so far from 1 correct for nothing any more."""


class LogprobMismatch(RuntimeError):
    """Trainer and rollout engine disagree on the probability of the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a step's updates have to report, equal on every rank."""

    result: UpdateResult
    """The updates' mean numbers."""
    grad_norm: float
    """Mean over the updates."""
    learning_rate: float


def train_on(
    run: RunConfig,
    state: TrainState,
    terms: Terms,
    inputs: StepInputs,
    micro_batches: Sequence[Sequence[PackedBatch]],
    *,
    step: int,
    mu_gradient: MuGradient | None,
) -> Trained:
    """All updates of a step.

    Raises:
        LogprobMismatch: before the first of them.
    """
    temperature = run.rollout.temperature
    prepared = [prepare_batches(state, batches, terms, temperature=temperature) for batches in micro_batches]
    results: list[UpdateResult] = []
    norms: list[float] = []
    learning_rate = 0.0
    for _ in range(run.batch.epochs):
        for update, batches in zip(inputs.updates, prepared, strict=True):
            if mu_gradient is not None:
                result, slope = mu_gradient.compute(state, batches, update, terms, temperature=temperature)
                result.means["mu_gradient"] = slope
            else:
                result = compute_gradients(state, batches, update, terms, temperature=temperature)
            if not results:
                _check_gap(run, result, step=step, age=step - inputs.weight_version)
            norm, learning_rate = apply_gradients(state, new_step=not results, skip=not update.counts)
            results.append(result)
            norms.append(norm)
    return Trained(
        result=mean_result(results), grad_norm=statistics.fmean(norms), learning_rate=learning_rate
    )


def _check_gap(run: RunConfig, result: UpdateResult, *, step: int, age: int) -> None:
    """Before the update: a gap means wrong weights, wrong temperature or a shifted log-prob somewhere.

    Rollouts that are ``age`` > 0 steps old differ because the policy has moved; too far, and no correction helps.
    """
    gap = result.means.get("logprob_gap")
    dtypes = {run.model.dtype, run.rollout.dtype or run.model.dtype}
    limit = run.rollout.max_logprob_gap
    if limit is None:
        limit = max(_MAX_GAP[dtype] for dtype in dtypes) if age == 0 else _MAX_STALE_GAP
    if gap is not None and not gap <= limit:
        raise LogprobMismatch(
            f"step {step}: trainer and rollout log-probs of the same tokens "
            f"{f'(sampled by weights {age} steps older) ' if age else ''}differ by {gap:.2e} on average (at most "
            f" {result.maxima['logprob_gap_max']:.2e}); rollout.max_logprob_gap is {limit:.0e}. "
            "Nothing was trained on them"
        )
