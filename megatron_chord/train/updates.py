"""All updates of one step, after a last look at the rollouts: do trainer and rollout engine agree on them?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.train.agreement import check_agreement
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
            compute = compute_gradients if mu_gradient is None else mu_gradient.compute
            measured = compute(state, batches, update, terms, temperature=temperature)
            if not results:
                check_agreement(run, measured.result, step=step, age=step - inputs.weight_version)
            norm, learning_rate = apply_gradients(state, new_step=not results, skip=not update.counts)
            results.append(measured.result)
            norms.append(norm)
    return Trained(
        result=mean_result(results), grad_norm=statistics.fmean(norms), learning_rate=learning_rate
    )
