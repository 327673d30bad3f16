"""The on-policy branch: advantages, surrogates (PPO, GSPO, CISPO, unclipped), importance correction, KL penalty.

r = exp(l - l_old)        l the policy's log-prob, l_old by ``objective.ratio_from``
ppo        -min(r A, clip(r, 1 - low, 1 + high) A)                      GRPO, DAPO (arXiv 2503.14476)
dual clip  min(that, -c A) where A < 0                                  arXiv 1912.09729
gspo       ppo with s in place of r: s = sg(exp(mean over the sequence of l - l_old)) p / sg(p)    arXiv 2507.18071
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
"""The column of a term whose tokens the rollout engine sampled: their log-probs there. The step compares them with the
trainer's for every term that has this column, whatever its loss reports (``losses.objective``)."""
COMPARED = ("tokens", "gap", "gap_squared", "factor", "factor_squared", "logit")
"""The names of what ``comparison`` returns."""
MAX_FACTOR = 10.0
"""In the check of trainer against rollout engine, two probabilities of a token differ by at most this factor."""


def group_advantages(groups: Sequence[Sequence[float]], *, kind: str, eps: float) -> list[tuple[float, ...]]:
    """Advantages of each group's rewards, by ``objective.advantage``; exactly 0 in a group of equal rewards.

    With the group's mean m and unbiased standard deviation s, and b that of all rewards of the step:
    group_std (R - m) / (s + eps); group_mean R - m; batch_std (R - m) / (b + eps); leave_one_out R - the others' mean.
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
    """[K] bool: the ratio's clip is active"""
    dual_clipped: Tensor
    """[K] bool: the dual clip is active"""
    ratio: Tensor
    """[K], detached"""


def surrogate(
    logprobs: Tensor, old_logprobs: Tensor, tokens: TermTokens, objective: ObjectiveConfig
) -> Surrogate:
    """The loss of ``objective.surrogate`` per token. ``old_logprobs`` [K] and ``tokens["advantage"]`` are constants.

    A clipped token's gradient is 0, but for cispo, whose gradient is never cut.
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
    """How far trainer and rollout engine are apart on the same tokens, [K] each, detached.

    logprob_gap is |difference|, probability_error its exp: the factor by which the larger probability exceeds the
    other, 1 where they agree (NVIDIA NeMo-RL's token_mult_prob_error). A gap above MAX_LOG_RATIO counts as that.
    """
    gap = (logprobs - rollout_logprobs).abs().detach()
    return {"logprob_gap": gap, "probability_error": gap.clamp(max=MAX_LOG_RATIO).exp()}


def comparison(
    stats: TokenStats, rollout_logprobs: Tensor, *, counted: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """What ``train.agreement`` judges trainer and rollout engine by: the names in COMPARED, [K] each, detached.

    With g = |difference of the log-probs| and f = min(exp(g), MAX_FACTOR) - 1, both with their squares, so that a mean
    has its standard error. The limit on f keeps one wild token among many from being the whole mean. ``logit``: the
    sizes of the tokens' logits, by which they are rounded; 0 where they are not known.

    Args:
        counted: [K], 1 for tokens that the rollout engine has scored, else 0.
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
        the constant that multiplies each token's loss [K], and [K] bool: the weight was cut, or masked.
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
        # A weight that is NaN lies within no bounds, and must not be taken for 1.
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
    """``loss`` [K] + ``objective``'s KL penalty - its entropy bonus; and the KL [K], detached, where it is asked for.

    Column: reference_logprob with ``kl``.
    """
    kl = None
    if objective.kl is not None:
        kl = kl_penalty(stats.logprobs, tokens["reference_logprob"], objective.kl.estimator)
        loss = loss + objective.kl.coefficient * kl
    if objective.entropy_bonus:
        loss = loss - objective.entropy_bonus * stats.entropy
    return loss, None if kl is None else kl.detach()


def policy_loss(stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig) -> TermOutput:
    """Surrogate x importance correction + KL penalty - entropy bonus, per token of a rollout.

    Columns: advantage, rollout_logprob; old_logprob with ``ratio_from: recomputed``; reference_logprob with ``kl``.
    """
    logprobs = stats.logprobs
    old = {
        "rollout": lambda: tokens["rollout_logprob"],
        "current": logprobs.detach,
        "recomputed": lambda: tokens["old_logprob"],
    }[objective.ratio_from]()
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
            # Where A > 0 the clip bounds the loss; elsewhere one token's ratio can be the whole step.
            "ratio_max": torch.where(tokens["advantage"] < 0, ratio, 0.0),
        },
    )
