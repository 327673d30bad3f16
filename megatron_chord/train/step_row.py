"""The row of ``metrics.jsonl`` of one training step (docs/running.md describes the metrics)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_chord.losses.terms import num_forward_passes
from megatron_chord.train.context import RunContext
from megatron_chord.train.coordinator import StepInputs
from megatron_chord.train.health import not_finite
from megatron_chord.train.step import Trained
from megatron_chord.train.throughput import held_gpus, own_gpu, throughput


def step_row(
    step: int, inputs: StepInputs, trained: Trained, *, terms: Iterable[str], num_micro_batches: int
) -> dict[str, Any]:
    """The metrics of one step that do not depend on time; equal on every rank.

    Numbers that are not finite are left out, and ``not_finite`` has their names.

    Args:
        terms: names of the terms of the method.
        num_micro_batches: number of this rank's micro-batches, over all updates of the step.
    """
    result = trained.result
    row = {
        "step": step,
        **({"mu": inputs.mu} if inputs.mu is not None else {}),
        "loss": result.loss,
        **result.means,
        **result.maxima,
        **({"compared_tokens": round(tokens)} if (tokens := result.compared.get("tokens")) else {}),
        **{f"num_{term}_tokens": sum(u.counts.get(term, 0) for u in inputs.updates) for term in terms},
        **inputs.stats,
        **trained.routing,
        **({"grad_norm": trained.grad_norm} if trained.grad_norm is not None else {}),
        **({"grad_norm_ratio": trained.grad_norm_ratio} if trained.grad_norm_ratio is not None else {}),
        "zero_gradient": trained.zero_gradient,
        "skipped_updates": trained.num_skipped,
        "learning_rate": trained.learning_rate,
        "weight_version": inputs.weight_version,
        "micro_batches": num_micro_batches,
    }
    broken = not_finite(result)
    row = {name: value for name, value in row.items() if name not in broken}
    return row | {"not_finite": broken} if broken else row


def speed_row(context: RunContext, inputs: StepInputs, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The metrics of one step that depend on time. ``seconds`` has the seconds of each phase; it becomes a metric.

    Resets the time of the engine's pushes. Call it once per step.
    """
    world_size = context.state.groups.world_size
    trained = {name for update in inputs.updates for name in update.counts}
    forward = num_forward_passes(context.terms[name] for name in trained)
    return {
        "tokens_per_s": inputs.num_tokens / seconds["total"],
        **throughput(
            context.state.shape,
            tokens=inputs.num_tokens,
            squared_tokens=inputs.squared_tokens,
            passes=context.run.batch.epochs + forward / 3,
            seconds=seconds["train"],
            ranks=world_size,
            gpu=own_gpu(),
        ),
        **held_gpus(world_size),
        "seconds": dict(seconds) | {"sync": context.engine.take_sync_seconds()},
    }
