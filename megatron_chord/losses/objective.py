"""The objective over one micro-batch: every term's tokens, each with its scale, each term with its weight.

For CHORD (arXiv 2508.11408, eq. 3) the terms are policy and demonstration with weights 1 - mu and mu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_chord.losses.aggregate import SCALE
from megatron_chord.losses.policy import ROLLOUT_LOGPROB, comparison
from megatron_chord.losses.terms import Term, TermTokens, TokenStats


class ObjectiveOutput(NamedTuple):
    """A micro-batch's part in the update's numbers."""

    loss: Tensor
    """Scalar, to be summed over micro-batches and ranks; connected to the graph even without a token."""
    sums: dict[str, dict[str, Tensor]]
    """By term and name: detached scalars to be summed; `means` are still to be divided by the term's tokens. In the
    order of `losses`, `means` and, for a term whose tokens have rollout log-probs, ``losses.policy.COMPARED``."""
    maxima: dict[str, Tensor]
    """Detached scalars whose maximum is meant."""


def objective(
    stats: TokenStats,
    tokens: Mapping[str, TermTokens],
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
) -> ObjectiveOutput:
    """This micro-batch's share of the update's loss and metrics.

    Args:
        stats: of the micro-batch's T trained tokens.
        tokens: of each term; every term of the update, also those without a token here.
        weights: of each term in this step.

    Collectives: those of the terms' losses, over the context-parallel ranks.
    """
    loss = stats.logprobs[:0].sum()  # not 0 times the sum, which is NaN where a log-prob is infinite
    sums: dict[str, dict[str, Tensor]] = {}
    maxima: dict[str, Tensor] = {}
    for name, here in tokens.items():
        own = stats.at(here.index)
        output = terms[name].loss(own, here)
        loss = loss + weights[name] * (here[SCALE] * output.loss).sum()
        with torch.no_grad():
            compared = _compared(own, here)
            # One sum for all names: each kernel of so little work costs a launch.
            values = [
                *(here[SCALE] * values for values in output.losses.values()),
                *output.means.values(),
                *compared.values(),
            ]
            totals = torch.stack(values).sum(1).unbind() if values else ()
            sums[name] = dict(zip((*output.losses, *output.means, *compared), totals, strict=True))
            for key, candidates in output.maxima.items():
                maxima[key] = torch.cat([candidates, candidates.new_zeros(1)]).max()
    return ObjectiveOutput(loss, sums, maxima)


def _compared(stats: TokenStats, tokens: TermTokens) -> dict[str, Tensor]:
    """Trainer against rollout engine, for every term that has the engine's log-probs; [K] each.

    A column ``is_rollout`` says which of the term's tokens the engine sampled, where not all are.
    """
    if ROLLOUT_LOGPROB not in tokens.columns:
        return {}
    counted = tokens.columns.get("is_rollout", 1.0)
    return comparison(stats, tokens[ROLLOUT_LOGPROB], counted=counted)
