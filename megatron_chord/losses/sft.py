"""The SFT branch: negative log-likelihood of demonstrations, each token with a detached weight.

Without the stop-gradient on phi a rare token (p < 0.2356) would be pushed down, not up: the logit gradient
p(1-p)[(1-2p) ln p + 1-p] changes its sign there. No weight is renormalised.
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
"""(p [K], the tokens' stats, what is known of them, the weight's settings) -> weights [K]; called without gradient."""


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
    "focal": lambda p, stats, tokens, weight: (1 - p) ** weight.exponent,
    "bernoulli_entropy": lambda p, stats, tokens, weight: -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p),
    "entropy_top": lambda p, stats, tokens, weight: tokens["entropy_weight"],
    "entropy_norm": lambda p, stats, tokens, weight: tokens["entropy_weight"],
    "margin": _margin,
}
"""By the kind in ``method.token_weight``; ``config_methods`` has their settings and meaning."""


def sft_loss(
    stats: TokenStats, tokens: TermTokens, *, weight: TokenWeight, cutoff: float = 1.0
) -> TermOutput:
    """-w log p per token, w detached (CHORD eq. 1, 4 and 6); tokens with p > cutoff get no gradient.

    As in Trinity-RFT's ``sft_phi`` a token above the cutoff keeps -w log(cutoff) in the loss, w from its own p.
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
    """The SFT branch as a term; ``aggregation`` and ``aggregation_length`` as in Term.

    ``temperature`` is not that of sampling: at 0.6 another distribution would be fitted to the demonstrations than is
    served at 1, and where the model fits them phi would be several times smaller.
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
    """``column``: 1 for the ``share`` of the update's tokens with the highest ``old_entropy``, else 0.

    All NaN where an entropy is: compared with NaN, every token would be one of the others.
    """

    def prepare(batches: Sequence[TermTokens], across: AcrossRanks) -> list[Mapping[str, Tensor]]:
        threshold = top_threshold(_all_entropies(batches, across), share)
        return [
            {column: torch.where(threshold.isnan(), torch.nan, (batch["old_entropy"] >= threshold).float())}
            for batch in batches
        ]

    return prepare


def top_threshold(values: Tensor, share: float) -> Tensor:
    """The smallest of the ceil(share x n) largest of n values; infinite when there is none, NaN where one is."""
    if len(values) == 0:
        return values.new_full((), torch.inf)
    count = max(1, math.ceil(round(share * len(values), 6)))
    return torch.where(values.isnan().any(), torch.nan, values.topk(count).values[-1])


def _over_mean_entropy(batches: Sequence[TermTokens], across: AcrossRanks) -> list[Mapping[str, Tensor]]:
    """The column ``entropy_weight``: old_entropy / its mean over the update's tokens."""
    mean = _all_entropies(batches, across).double().mean().float().clamp(min=torch.finfo(torch.float32).tiny)
    return [{"entropy_weight": batch["old_entropy"] / mean} for batch in batches]


def _all_entropies(batches: Sequence[TermTokens], across: AcrossRanks) -> Tensor:
    return across.collect(torch.cat([batch["old_entropy"] for batch in batches]))
