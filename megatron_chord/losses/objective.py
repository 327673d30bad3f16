"""The objective over one micro-batch: the sum over terms of weight x sum over tokens of scale x loss.

An entropy bonus that is averaged apart (``Term.entropy_bonus``) is subtracted from it.

CHORD (arXiv 2508.11408, eq. 3) has two terms: the policy term with weight 1 - mu and the SFT term with weight mu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_chord.losses.aggregate import ENTROPY_SCALE, SCALE
from megatron_chord.losses.policy import ROLLOUT_LOGPROB, comparison
from megatron_chord.losses.terms import Term, TermTokens, TokenStats


class ObjectiveOutput(NamedTuple):
    """The contribution of one micro-batch to the loss and metrics of the update."""

    loss: Tensor
    """Scalar. The caller sums it over micro-batches and ranks. It is part of the autograd graph even if the micro-batch
    has no trained token."""
    sums: dict[str, dict[str, Tensor]]
    """Detached scalars, by term and then by metric. The caller sums them over micro-batches and ranks and then divides
    `means` by the number of the term's tokens. Order: `losses`, `means`, then ``losses.policy.COMPARED`` if the term's
    tokens have rollout log-probs."""
    maxima: dict[str, Tensor]
    """Detached scalars, by metric. The caller takes their maximum over micro-batches and ranks."""


def objective(
    stats: TokenStats,
    tokens: Mapping[str, TermTokens],
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
) -> ObjectiveOutput:
    """The contribution of one micro-batch to the loss and metrics of the update.

    Args:
        stats: log-probs, entropies and so on of the micro-batch's T trained tokens.
        tokens: by term, the term's tokens in this micro-batch. It has every term of the update, also terms that have no
            token in this micro-batch.
        terms: by name, the terms of the method's objective.
        weights: by term, its weight in this step.

    Collectives: only those of the terms' losses, over the context-parallel ranks.
    """
    loss = stats.logprobs[:0].sum()  # not 0 times the sum: that is NaN if a log-prob is infinite
    sums: dict[str, dict[str, Tensor]] = {}
    maxima: dict[str, Tensor] = {}
    for name, here in tokens.items():
        own = stats.at(here.index)
        output = terms[name].loss(own, here)
        loss = loss + weights[name] * (here[SCALE] * output.loss).sum()
        if terms[name].entropy_bonus:
            loss = loss - terms[name].entropy_bonus * (here[ENTROPY_SCALE] * own.entropy).sum()
        with torch.no_grad():
            compared = _compare_with_engine(own, here)
            # One sum for all metrics instead of one for each: small kernels cost mainly their launch.
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


def _compare_with_engine(stats: TokenStats, tokens: TermTokens) -> dict[str, Tensor]:
    """Compare the log-probs of trainer and rollout engine: [K] for each name, or nothing without the engine's
    log-probs.

    If the engine sampled only some of the term's tokens, the column ``is_rollout`` is 1 for these and 0 for the others.
    """
    if ROLLOUT_LOGPROB not in tokens.columns:
        return {}
    counted = tokens.columns.get("is_rollout", 1.0)
    return comparison(stats, tokens[ROLLOUT_LOGPROB], counted=counted)
