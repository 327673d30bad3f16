"""Runs all updates of one step. First it checks that trainer and rollout engine agree on the step's rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.train.agreement import check_agreement
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.health import Health, not_finite, save_batch
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.routing import take_routing
from megatron_chord.train.state import NonFiniteGradient, TrainState
from megatron_chord.train.update import (
    Terms,
    Update,
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
    """The means over the updates that were not skipped. If all were skipped, the numbers of the last one. ``means``
    also has the metrics of the extra update (``Update.is_extra``), with its loss and its gradient norm as
    ``extra_loss`` and ``extra_grad_norm``. Of the other numbers only ``num_skipped`` includes it."""
    grad_norm: float | None
    """Mean over the updates that were not skipped; None if all were skipped."""
    learning_rate: float
    num_skipped: int
    """Number of updates that were skipped because their loss or gradient was not finite."""
    zero_gradient: float
    """Share of the other updates whose gradient is exactly 0 although they have trained tokens."""
    grad_norm_ratio: float | None
    """``grad_norm`` divided by the median over earlier steps; None if there are too few."""
    routing: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Metrics of the experts (``train.routing``), over all updates; empty for a dense model."""


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
    updates = list(zip(inputs.updates, prepared, micro_batches, strict=True))
    own = [item for item in updates if not item[0].is_extra]
    results: list[UpdateResult] = []
    norms: list[float] = []
    zeros: list[bool] = []
    extra: dict[str, float] = {}
    learning_rate, number, applied, last = 0.0, 0, 0, None
    for update, batches, packed in (*own * run.batch.epochs, *updates[len(own) :]):
        compute = compute_gradients if mu_gradient is None else mu_gradient.compute
        if number > 0:  # later updates train changed weights
            update = replace(update, noise=None)
        found = compute(state, batches, update, terms, temperature=temperature).result
        last = last if update.is_extra else found
        broken = not_finite(found)
        if not broken and not results and not update.is_extra:
            check_agreement(run, found, step=step, age=step - inputs.weight_version)
        try:
            with _optimizer_state(state, update):
                norm, rate = apply_gradients(
                    state, new_step=number == 0, skip=not update.counts or bool(broken)
                )
            learning_rate = learning_rate if update.is_extra else rate
            if broken:
                raise NonFiniteGradient(f"not finite: {', '.join(broken)}")
        except NonFiniteGradient as error:
            state.optimizer.zero_grad()
            where = save_batch(
                run.output, packed, update, state.groups, step=step, number=number, reason=str(error)
            )
            health.count_skipped(error, step=step, allowed=run.optim.skip_nonfinite, where=where)
            if mu_gradient is not None:
                mu_gradient.forget()
        else:
            health.count_applied()
            applied += 1
            if state.averaged is not None and update.counts:
                state.averaged.update()
            if update.is_extra:
                extra = {**found.means, "extra_loss": found.loss, "extra_grad_norm": norm}
            else:
                results.append(found)
                norms.append(norm)
                zeros.append(bool(update.counts) and norm == 0.0)
        number += 1
    assert last is not None
    grad_norm = statistics.fmean(norms) if norms else None
    result = mean_result(results) if results else last
    return Trained(
        result=replace(result, means=result.means | extra),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_skipped=number - applied,
        zero_gradient=statistics.fmean(zeros) if zeros else 0.0,
        grad_norm_ratio=health.norm_ratio(grad_norm) if grad_norm is not None else None,
        routing=take_routing(state),
    )


def _optimizer_state(state: TrainState, update: Update) -> AbstractContextManager[None]:
    """Within the context, the optimizer has the state with which ``update`` is applied."""
    if not update.is_extra:
        return nullcontext()
    assert state.second is not None
    return state.second.active()
