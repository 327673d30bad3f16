"""One optimizer step: gradients of the whole step's objective, clipped, applied; and its numbers over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.config import ObjectiveConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.losses.objective import LossTokens, StepWeights, chord_loss
from megatron_chord.model.forward import run_micro_batches
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.state import TrainState

_POLICY_MEANS = ("policy_loss", "entropy", "clip_fraction", "logprob_gap")
_EXPERT_MEANS = ("expert_loss", "expert_nll", "expert_p", "expert_phi")
_MAXIMA = ("logprob_gap_max",)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The step's numbers, equal on every rank: means over the step's policy or expert tokens, and totals."""

    loss: float
    means: dict[str, float]
    """None of a kind's means is there when the step had no token of that kind."""
    maxima: dict[str, float]


def compute_gradients(
    state: TrainState,
    micro_batches: Sequence[PackedBatch],
    weights: StepWeights,
    objective: ObjectiveConfig,
    *,
    temperature: float,
) -> StepResult:
    """Loss and gradients of the step in the parameters' ``main_grad``; changes no weight.

    Args:
        micro_batches: this data-parallel rank's, equally many on every rank.
        weights: the same on every rank, with the counts of the whole step.

    Collectives: those of Megatron's schedule and gradient reduction, and 2 all-reduces over all ranks.
    """

    def loss(logprobs: Tensor, entropy: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
        value, sums, maxima = chord_loss(logprobs, entropy, tokens, weights, objective)
        return value, {"loss": value.detach().clone(), **sums, **maxima}

    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    kept = run_micro_batches(
        state.chunks,
        micro_batches,
        loss,
        groups=state.groups,
        vocab_size=state.shape.vocab_size,
        temperature=temperature,
    )
    return _reduce(kept, weights, state.groups)


def apply_gradients(state: TrainState) -> tuple[float, float]:
    """Clip, update the weights, advance the schedule. Returns the gradient norm before clipping, and the rate used.

    The schedule advances first, so that the first step of a warm-up is not wasted on a rate of 0.
    """
    state.scheduler.step(1)
    learning_rate = max(group["lr"] for group in state.optimizer.param_groups)
    succeeded, grad_norm, _ = state.optimizer.step()
    assert succeeded, "only fp16 loss scaling skips steps"
    state.optimizer.zero_grad()
    return float(grad_norm or 0.0), float(learning_rate)


def _reduce(kept: Sequence[dict[str, Tensor]], weights: StepWeights, groups: ParallelGroups) -> StepResult:
    """Add up what the last pipeline stage's ranks kept, each token counted once."""
    sum_names = ("loss", *_POLICY_MEANS, *_EXPERT_MEANS)
    counts_here = groups.is_last_stage and groups.tensor.rank == 0
    sums = torch.zeros(len(sum_names), dtype=torch.float64, device=groups.device)
    maxima = torch.zeros(len(_MAXIMA), dtype=torch.float64, device=groups.device)
    if counts_here:
        for row in kept:
            sums += torch.stack([row[name].double() for name in sum_names])
            maxima = torch.maximum(maxima, torch.stack([row[name].double() for name in _MAXIMA]))
    dist.all_reduce(sums)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    total = dict(zip(sum_names, sums.tolist(), strict=True))
    means: dict[str, float] = {}
    if weights.num_policy_tokens:
        means |= {name: total[name] / weights.num_policy_tokens for name in _POLICY_MEANS}
    if weights.num_expert_tokens:
        means |= {name: total[name] / weights.num_expert_tokens for name in _EXPERT_MEANS}
    return StepResult(
        loss=total["loss"], means=means, maxima=dict(zip(_MAXIMA, maxima.tolist(), strict=True))
    )
