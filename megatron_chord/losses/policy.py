"""The on-policy branch: advantages, surrogates (PPO, GSPO, CISPO, unclipped), importance correction, KL penalty.

r = exp(l - l_old)        l is the policy's log-prob; ``objective.ratio_from`` chooses l_old
ppo        -min(r A, clip(r, 1 - low, 1 + high) A)                      GRPO, DAPO (arXiv 2503.14476)
dual clip  min(that, -c A) where A < 0                                  arXiv 1912.09729
gspo       ppo with s instead of r: s = sg(exp(mean over the sequence of l - l_old)) p / sg(p)     arXiv 2507.18071
cispo      -sg(clip(r)) A l                                             arXiv 2506.13585
unclipped  -r A
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_chord.config import CorrectionConfig, ObjectiveConfig
from megatron_chord.losses.terms import TermOutput, TermTokens, TokenStats

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 so that one broken token cannot overflow the exponential."""
ROLLOUT_LOGPROB = "rollout_logprob"
"""Name of the column with the rollout engine's log-probs of the tokens that it sampled. For every term with this column
the step compares them with the trainer's log-probs, independent of the metrics of the term (``losses.objective``)."""
COMPARED = ("tokens", "gap", "gap_squared", "factor", "factor_squared", "logit")
"""The names of the values that ``comparison`` returns."""
MAX_FACTOR = 10.0
"""The comparison of trainer and rollout engine limits the ratio of a token's two probabilities to this factor."""


def group_advantages(groups: Sequence[Sequence[float]], *, kind: str, eps: float) -> list[tuple[float, ...]]:
    """The advantage of each reward, grouped as the rewards are. Exactly 0 in a group whose rewards are all equal.

    m is the group's mean, s the group's unbiased standard deviation, b that of all rewards of the step. ``kind`` is
    ``objective.advantage``:
        group_std      (R - m) / (s + eps)
        group_mean     R - m
        batch_std      (R - m) / (b + eps)
        leave_one_out  R - mean of the group's other rewards
    """
    everything = [reward for rewards in groups for reward in rewards]
    batch_std = statistics.stdev(everything) if kind == "batch_std" and len(everything) > 1 else 0.0

    def of(rewards: Sequence[float]) -> tuple[float, ...]:
        if max(rewards) == min(rewards):
            return (0.0,) * len(rewards)
        mean, n = statistics.fmean(rewards), len(rewards)
        scale = {
            "group_std": lambda: 1 / (statistics.stdev(rewards) + eps),
            "group_mean": lambda: 1.0,
            "batch_std": lambda: 1 / (batch_std + eps),
            "leave_one_out": lambda: n / (n - 1),
        }[kind]()
        return tuple((reward - mean) * scale for reward in rewards)

    return [of(rewards) for rewards in groups]


class Surrogate(NamedTuple):
    loss: Tensor
    """[K]"""
    clipped: Tensor
    """[K] bool: true where the ratio is clipped"""
    dual_clipped: Tensor
    """[K] bool: true where the dual clip limits the loss"""
    ratio: Tensor
    """[K], detached"""


def surrogate(
    logprobs: Tensor, old_logprobs: Tensor, tokens: TermTokens, objective: ObjectiveConfig
) -> Surrogate:
    """The loss per token that ``objective.surrogate`` chooses. ``old_logprobs`` [K] and ``tokens["advantage"]`` are
    constants.

    The gradient of a clipped token is 0, except with cispo: there a clipped token keeps a gradient.
    """
    advantages = tokens["advantage"]
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    log_ratio = logprobs - old_logprobs.detach()
    if objective.surrogate == "gspo":
        of_sequence = tokens.sequence_means(log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = (of_sequence + (logprobs - logprobs.detach())).exp()
    else:
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    within = ratio.clamp(low, high)
    nothing = torch.zeros_like(ratio, dtype=torch.bool)
    if objective.surrogate == "unclipped":
        return Surrogate(-ratio * advantages, nothing, nothing, ratio.detach())
    if objective.surrogate == "cispo":
        loss = -within.detach() * advantages * logprobs
        return Surrogate(loss, (within != ratio).detach(), nothing, ratio.detach())
    loss = -torch.minimum(ratio * advantages, within * advantages)
    clipped = (within * advantages < ratio * advantages).detach()
    if objective.dual_clip is None:
        return Surrogate(loss, clipped, nothing, ratio.detach())
    bound = -advantages * objective.dual_clip
    dual = ((advantages < 0) & (loss > bound)).detach()
    return Surrogate(torch.where(dual, bound, loss), clipped, dual, ratio.detach())


def logprob_gap_stats(logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """Differences between the log-probs of trainer and rollout engine for the same tokens: [K] each, detached.

    logprob_gap is the absolute difference, limited to MAX_LOG_RATIO. probability_error is exp(logprob_gap), the ratio
    of the larger to the smaller probability; it is 1 if they are equal (NVIDIA NeMo-RL's token_mult_prob_error).
    """
    gap = (logprobs - rollout_logprobs).abs().detach()
    return {"logprob_gap": gap, "probability_error": gap.clamp(max=MAX_LOG_RATIO).exp()}


def comparison(
    stats: TokenStats, rollout_logprobs: Tensor, *, counted: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """The values from which ``train.agreement`` checks that trainer and rollout engine agree: [K] each, detached.

    The names are those in COMPARED. gap is g = |difference of the log-probs|; factor is f = min(exp(g), MAX_FACTOR) -
    1. The squares of both are needed for the standard error of their means. The limit on f prevents that one outlier
    dominates the mean. ``logit`` is the absolute value of the token's logit, because the rounding error of a logit
    depends on it; it is 0 if the logit is not known.

    Args:
        counted: [K], 1 for tokens that have a log-prob of the rollout engine, else 0.
    """
    gap = (stats.logprobs - rollout_logprobs).abs().detach()
    factor = gap.clamp(max=math.log(MAX_FACTOR)).expm1()
    values = {
        "tokens": torch.ones_like(gap),
        "gap": gap,
        "gap_squared": gap.square(),
        "factor": factor,
        "factor_squared": factor.square(),
        "logit": torch.zeros_like(gap) if stats.logit is None else stats.logit.abs(),
    }
    return {name: counted * value for name, value in values.items()}


def correction_weights(
    old_logprobs: Tensor, tokens: TermTokens, correction: CorrectionConfig
) -> tuple[Tensor, Tensor]:
    """Importance weights between the trainer's and the rollout engine's log-probs of the same tokens.

    Returns:
        a constant factor for each token's loss [K], and [K] bool: true where the weight was truncated or masked.
    """
    gap = (old_logprobs.detach() - tokens["rollout_logprob"]).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if correction.level == "sequence":
        gap = tokens.sequence_sums(gap).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    elif correction.level == "geometric":
        gap = tokens.sequence_means(gap)
    weight = gap.exp()
    outside = weight > correction.high
    if correction.mode != "truncate":
        outside = outside | (weight < correction.low)
    if correction.mode in ("mask", "reject"):
        # A weight that is NaN counts as outside of the bounds, but it must stay NaN and not become 1.
        kept = weight if correction.mode == "mask" else torch.where(weight.isnan(), weight, 1.0)
        return torch.where(outside, 0.0, kept), outside
    low = 0.0 if correction.mode == "truncate" else correction.low
    return weight.clamp(low, correction.high), outside


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman's per-token estimators of KL(policy || reference), differentiable: k1, k2 or k3. All [K]."""
    difference = reference_logprobs.detach() - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - 1 - difference


def with_penalties(
    loss: Tensor, stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor | None]:
    """Add the KL penalty and subtract the entropy bonus of ``objective`` from ``loss`` [K].

    An entropy bonus that is averaged apart is not subtracted here (``Term.entropy_bonus``).

    Column: reference_logprob, if ``kl`` is set.

    Returns:
        the loss [K], and the KL [K], detached; None if ``kl`` is not set.
    """
    kl = None
    if objective.kl is not None:
        kl = kl_penalty(stats.logprobs, tokens["reference_logprob"], objective.kl.estimator)
        loss = loss + objective.kl.coefficient * kl
    if objective.entropy_bonus and not objective.averages_entropy_apart:
        loss = loss - objective.entropy_bonus * stats.entropy
    return loss, None if kl is None else kl.detach()


def old_logprobs(stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig) -> Tensor:
    """The log-probs in the denominator of the ratio, by ``objective.ratio_from``: [K], without a gradient."""
    return {
        "rollout": lambda: tokens["rollout_logprob"],
        "current": stats.logprobs.detach,
        "recomputed": lambda: tokens["old_logprob"],
    }[objective.ratio_from]()


def policy_loss(stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig) -> TermOutput:
    """Surrogate x importance correction + KL penalty - entropy bonus, per token of a rollout.

    Columns: advantage; rollout_logprob; old_logprob if ``ratio_from`` is `recomputed`; reference_logprob if ``kl`` is
    set.
    """
    logprobs = stats.logprobs
    old = old_logprobs(stats, tokens, objective)
    loss, clipped, dual_clipped, ratio = surrogate(logprobs, old, tokens, objective)
    apart = logprob_gap_stats(logprobs, tokens["rollout_logprob"])
    means = {"entropy": stats.entropy.detach(), "clip_fraction": clipped.float(), **apart}
    if objective.dual_clip is not None:
        means["dual_clip_fraction"] = dual_clipped.float()
    if objective.correction is not None and objective.correction.mode != "none":
        weight, outside = correction_weights(old, tokens, objective.correction)
        loss = loss * weight
        means |= {"correction_weight": weight, "correction_outside": outside.float()}
    losses = {"policy_loss": loss.detach()}
    loss, kl = with_penalties(loss, stats, tokens, objective)
    if kl is not None:
        means["kl"] = kl
    return TermOutput(
        loss,
        losses,
        means,
        {
            "logprob_gap_max": apart["logprob_gap"],
            # If A > 0 the clip bounds the loss. If A < 0 the loss is not bounded, and one token can dominate the step.
            "ratio_max": torch.where(tokens["advantage"] < 0, ratio, 0.0),
        },
    )
