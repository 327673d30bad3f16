"""Runs all updates of one step. First it checks that trainer and rollout engine agree on the step's rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.train.agreement import check_agreement
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.health import Health, not_finite, save_batch
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.state import NonFiniteGradient, TrainState
from megatron_chord.train.update import (
    Terms,
    UpdateResult,
    apply_gradients,
    compute_gradients,
    mean_result,
    prepare_batches,
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The results of a step's updates, equal on every rank."""

    result: UpdateResult
    """The means over the updates that were not skipped. If all were skipped, the numbers of the last one."""
    grad_norm: float | None
    """Mean over the updates that were not skipped; None if all were skipped."""
    learning_rate: float
    num_skipped: int
    """Number of updates that were skipped because their loss or gradient was not finite."""
    zero_gradient: float
    """Share of the other updates whose gradient is exactly 0 although they have trained tokens."""
    grad_norm_ratio: float | None
    """``grad_norm`` divided by the median over earlier steps; None if there are too few."""


def train_step(
    run: RunConfig,
    state: TrainState,
    terms: Terms,
    inputs: StepInputs,
    micro_batches: Sequence[Sequence[PackedBatch]],
    *,
    step: int,
    mu_gradient: MuGradient | None,
    health: Health | None = None,
) -> Trained:
    """Run all updates of a step.

    Args:
        health: the state of the earlier steps; it is changed.

    Raises:
        LogprobMismatch: trainer and rollout engine disagree; raised before the first update changes a weight.
        NonFiniteGradient: more than ``optim.skip_nonfinite`` updates in a row were not finite.
    """
    health = health or Health()
    temperature = run.rollout.temperature
    prepared = [prepare_batches(state, batches, terms, temperature=temperature) for batches in micro_batches]
    results: list[UpdateResult] = []
    norms: list[float] = []
    zeros: list[bool] = []
    learning_rate, number, last = 0.0, 0, None
    for _ in range(run.batch.epochs):
        for update, batches, packed in zip(inputs.updates, prepared, micro_batches, strict=True):
            compute = compute_gradients if mu_gradient is None else mu_gradient.compute
            if number > 0:  # later epochs train changed weights
                update = replace(update, noise=None)
            last = compute(state, batches, update, terms, temperature=temperature).result
            broken = not_finite(last)
            if not broken and not results:
                check_agreement(run, last, step=step, age=step - inputs.weight_version)
            try:
                norm, learning_rate = apply_gradients(
                    state, new_step=number == 0, skip=not update.counts or bool(broken)
                )
                if broken:
                    raise NonFiniteGradient(f"not finite: {', '.join(broken)}")
            except NonFiniteGradient as error:
                state.optimizer.zero_grad()
                where = save_batch(
                    run.output, packed, update, state.groups, step=step, number=number, reason=str(error)
                )
                health.left_out(error, step=step, allowed=run.optim.skip_nonfinite, where=where)
                if mu_gradient is not None:
                    mu_gradient.forget()
            else:
                health.applied()
                results.append(last)
                norms.append(norm)
                zeros.append(bool(update.counts) and norm == 0.0)
            number += 1
    assert last is not None
    grad_norm = statistics.fmean(norms) if norms else None
    return Trained(
        result=mean_result(results) if results else last,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_skipped=number - len(results),
        zero_gradient=statistics.fmean(zeros) if zeros else 0.0,
        grad_norm_ratio=health.norm_ratio(grad_norm) if grad_norm is not None else None,
    )
