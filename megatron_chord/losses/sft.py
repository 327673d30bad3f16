"""The SFT branch: negative log-likelihood of demonstrations, each token with a detached weight.

The weight phi must be detached. Otherwise training would lower, not raise, the probability of a rare token
(p < 0.2356), because the gradient p(1-p)[(1-2p) ln p + 1-p] with respect to the logit changes its sign there. No weight
is renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_chord.config_methods import EntropyNormWeight, EntropyTopWeight, MarginWeight, TokenWeight
from megatron_chord.losses.terms import AcrossRanks, Prepare, Term, TermOutput, TermTokens, TokenStats

WeightFunction = Callable[[Tensor, TokenStats, TermTokens, Any], Tensor]
"""(p [K], the tokens' stats, the tokens' columns, the weight's settings) -> weights [K]; called without gradient."""


def _margin(p: Tensor, stats: TokenStats, tokens: TermTokens, weight: MarginWeight) -> Tensor:
    assert stats.rival is not None
    margin = p - stats.rival.exp()
    if weight.width is None:
        return 1 - margin.abs()
    return (-margin.square() / (2 * weight.width**2)).exp()


TOKEN_WEIGHTS: dict[str, WeightFunction] = {
    "one": lambda p, stats, tokens, weight: torch.ones_like(p),
    "p": lambda p, stats, tokens, weight: p,
    "phi": lambda p, stats, tokens, weight: p * (1 - p),
    "power": lambda p, stats, tokens, weight: weight.scale * p**weight.a * (1 - p) ** weight.b,
    "clipped_is": lambda p, stats, tokens, weight: p * (p <= weight.threshold),
    "trust_region": lambda p, stats, tokens, weight: (p / weight.threshold).clamp(max=1),
    "focal": lambda p, stats, tokens, weight: (1 - p) ** weight.exponent,
    "bernoulli_entropy": lambda p, stats, tokens, weight: -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p),
    "entropy_top": lambda p, stats, tokens, weight: tokens["entropy_weight"],
    "entropy_norm": lambda p, stats, tokens, weight: tokens["entropy_weight"],
    "margin": _margin,
}
"""The weight functions by ``method.token_weight.kind``. ``config_methods`` defines their settings and meaning."""


def sft_loss(
    stats: TokenStats, tokens: TermTokens, *, weight: TokenWeight, cutoff: float = 1.0
) -> TermOutput:
    """-w log p per token, w detached (CHORD eq. 1, 4 and 6); tokens with p > cutoff get no gradient.

    A token above the cutoff contributes -w log(cutoff) to the loss, where w is computed from its p, as in Trinity-RFT's
    ``sft_phi``.
    """
    logprobs = stats.logprobs
    with torch.no_grad():
        p = logprobs.exp().clamp(max=1)
        weights = TOKEN_WEIGHTS[weight.kind](p, stats, tokens, weight)
    pushed = (
        logprobs if cutoff == 1.0 else torch.where(p > cutoff, torch.full_like(p, cutoff).log(), logprobs)
    )
    loss = torch.where(weights == 0, 0.0, -weights * pushed)  # a log-prob of -inf times 0 would be NaN
    means = {
        "sft_nll": -logprobs.detach(),
        "sft_p": p,
        "sft_phi": p * (1 - p),
        "token_weight": weights,
    }
    return TermOutput(loss, {"sft_loss": loss.detach()}, means, {})


def sft_term(
    *,
    pool: str = "sft",
    weight: TokenWeight,
    cutoff: float = 1.0,
    temperature: float = 1.0,
    **aggregation: Any,
) -> Term:
    """The SFT branch as a term. ``aggregation`` and ``aggregation_length`` are those of ``Term``.

    ``temperature`` is independent of the sampling temperature. If the demonstrations were trained at a sampling
    temperature of 0.6, the distribution at temperature 1 would not be the one fitted to them. Also phi would be several
    times smaller on tokens that the model already predicts well.
    """

    def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
        return sft_loss(stats, tokens, weight=weight, cutoff=cutoff)

    prepare: Prepare | None = None
    if isinstance(weight, EntropyTopWeight):
        prepare = most_uncertain("entropy_weight", weight.share)
    elif isinstance(weight, EntropyNormWeight):
        prepare = _over_mean_entropy
    return Term(
        loss=loss,
        pool=pool,
        temperature=temperature,
        scored=frozenset({"old_entropy"}) if prepare is not None else frozenset(),
        prepare=prepare,
        rival=isinstance(weight, MarginWeight),
        **aggregation,
    )


def most_uncertain(column: str, share: float) -> Prepare:
    """Make ``column``: 1 for the ``share`` of the update's tokens with the highest ``old_entropy``, else 0.

    If any entropy is NaN, the whole column is NaN. A comparison with NaN is false, so the column would otherwise be 0
    everywhere and hide the fault.
    """

    def prepare(batches: Sequence[TermTokens], across: AcrossRanks) -> list[Mapping[str, Tensor]]:
        threshold = top_threshold(_all_entropies(batches, across), share)
        return [
            {column: torch.where(threshold.isnan(), torch.nan, (batch["old_entropy"] >= threshold).float())}
            for batch in batches
        ]

    return prepare


def top_threshold(values: Tensor, share: float) -> Tensor:
    """The smallest of the ceil(share x n) largest of n values. Infinite if n is 0; NaN if any value is NaN."""
    if len(values) == 0:
        return values.new_full((), torch.inf)
    count = max(1, math.ceil(round(share * len(values), 6)))
    return torch.where(values.isnan().any(), torch.nan, values.topk(count).values[-1])


def _over_mean_entropy(batches: Sequence[TermTokens], across: AcrossRanks) -> list[Mapping[str, Tensor]]:
    """Make the column ``entropy_weight``: old_entropy divided by its mean over the update's tokens."""
    mean = _all_entropies(batches, across).double().mean().float().clamp(min=torch.finfo(torch.float32).tiny)
    return [{"entropy_weight": batch["old_entropy"] / mean} for batch in batches]


def _all_entropies(batches: Sequence[TermTokens], across: AcrossRanks) -> Tensor:
    return across.collect(torch.cat([batch["old_entropy"] for batch in batches]))
