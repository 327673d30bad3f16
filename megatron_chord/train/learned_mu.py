"""The gradient of a learned mu (AMFT, arXiv 2508.06944; experimental): would more SFT have improved the next step?

One SGD step from theta is theta' = theta - eta ((1 - mu) g_RL + mu g_SFT). So the derivative of the utility after the
step with respect to mu is eta grad U(theta') . (g_RL - g_SFT). As an estimate of grad U(theta') we take the negative RL
gradient of the next step. Its prompts are new, so it is a held-out estimate. We know neither the paper's scale nor that
of Adam, so we take the product of unit vectors: a cosine in [-1, 1], which is positive if more SFT would have helped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.methods.chord import SFT
from megatron_chord.methods.groups import POLICY
from megatron_chord.model.forward import DeviceBatch
from megatron_chord.train.state import TrainState
from megatron_chord.train.update import Measured, Terms, Update, UpdateResult, compute_gradients

Gradients = Mapping[str, Tensor]


class MuGradient:
    """Computes the gradients of the two branches separately and stores their difference for one step.

    It needs memory for one more fp32 gradient, and for three at the peak. The difference is not saved in checkpoints,
    so the first step of a resumed run has no measurement.
    """

    def __init__(self) -> None:
        self._difference: Gradients | None = None

    def forget(self) -> None:
        """Delete the difference. Called after a skipped update, because the difference may not be finite."""
        self._difference = None

    def compute(
        self,
        state: TrainState,
        batches: Sequence[DeviceBatch],
        update: Update,
        terms: Terms,
        *,
        temperature: float,
    ) -> Measured:
        """Like ``compute_gradients``, but in two passes. The means include ``mu_gradient``; 0 if it is not known yet.

        Collectives: twice those of ``compute_gradients``, and 1 all-reduce over all ranks.
        """
        alone: dict[str, Measured] = {}
        parts: dict[str, Gradients] = {}
        for branch in (POLICY, SFT):
            only = replace(update, weights={POLICY: 0.0, SFT: 0.0, branch: 1.0})
            alone[branch] = compute_gradients(state, batches, only, terms, temperature=temperature)
            parts[branch] = {name: grad.clone() for name, grad in _gradients(state).items()}
        for name, grad in _gradients(state).items():
            grad.zero_()
            for branch, part in parts.items():
                grad.add_(part[name], alpha=update.weights[branch])
        products = torch.zeros(3, dtype=torch.float64, device=state.groups.device)
        if self._difference is not None and POLICY in update.counts:
            products = dot_products(state, parts[POLICY], self._difference)
        self._difference = (
            {name: parts[POLICY][name] - parts[SFT][name] for name in parts[POLICY]}
            if {POLICY, SFT} <= update.counts.keys()
            else None
        )
        policy, demonstration = alone[POLICY], alone[SFT]

        def finish(numbers: list[float]) -> UpdateResult:
            first, second = len(policy.values), len(policy.values) + len(demonstration.values)
            ours, theirs = policy.finish(numbers[:first]), demonstration.finish(numbers[first:second])
            loss = update.weights[POLICY] * ours.loss + update.weights[SFT] * theirs.loss
            return replace(ours, loss=loss, means={**ours.means, "mu_gradient": -cosine(*numbers[second:])})

        return Measured(values=torch.cat([policy.values, demonstration.values, products]), finish=finish)


def cosine(across: float, left: float, right: float) -> float:
    """The cosine of two vectors from their dot product and their squared norms. 0 if a vector is 0."""
    return across / max((left * right) ** 0.5, 1e-30)


def dot_products(state: TrainState, left: Gradients, right: Gradients) -> Tensor:
    """[3]: left x right, left x left, right x right, of two gradients of the whole model, every parameter counted once.

    One all-reduce over all ranks.
    """
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    counted = [
        name
        for name, parameter in state.parameters().items()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
    ]
    products = torch.zeros(3, dtype=torch.float64, device=state.groups.device)
    for name in counted:
        a, b = left[name].double(), right[name].double()
        products += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    dist.all_reduce(products)
    return products


def _gradients(state: TrainState) -> dict[str, Tensor]:
    return {name: parameter.main_grad for name, parameter in state.parameters().items()}  # type: ignore[attr-defined]
