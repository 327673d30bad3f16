"""CHORD's objective over one micro-batch: L = (1 - mu) L_GRPO + mu L_SFT (arXiv 2508.11408, eq. 3).

Policy and expert tokens lie in the same packed batch. The objective is a weighted sum over its tokens: a policy token
carries (1 - mu) / N_policy, an expert token mu / N_expert, where both counts are those of the **whole optimizer step**
over all ranks and micro-batches. So the sum over any split of the step is the same number, and so is its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_chord.config import ObjectiveConfig
from megatron_chord.losses.expert import TOKEN_WEIGHTS, weighted_nll
from megatron_chord.losses.policy import clipped_surrogate


@dataclass(frozen=True, kw_only=True)
class LossTokens:
    """What the objective knows of each of T trained tokens."""

    is_expert: Tensor
    """[T] bool"""
    advantages: Tensor
    """[T] fp32; 0 at expert tokens"""
    rollout_logprobs: Tensor
    """[T] fp32, the sampling engine's; 0 at expert tokens"""


@dataclass(frozen=True, kw_only=True)
class StepWeights:
    """mu and the step's global denominators: all that a micro-batch must know of the rest of its step."""

    mu: float
    num_policy_tokens: int
    num_expert_tokens: int

    @property
    def policy(self) -> float:
        return (1.0 - self.mu) / max(self.num_policy_tokens, 1)

    @property
    def expert(self) -> float:
        return self.mu / max(self.num_expert_tokens, 1)


def chord_loss(
    logprobs: Tensor, entropy: Tensor, tokens: LossTokens, weights: StepWeights, objective: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """This micro-batch's share of the step's loss.

    Args:
        logprobs, entropy: [T] from ``token_logprobs``, differentiable.

    Returns:
        the share of the loss, a scalar to be summed over micro-batches and ranks (0, but still connected to the
        graph, when T is 0); detached scalars to be summed likewise; detached scalars whose maximum is meant.
    """
    old_logprobs = tokens.rollout_logprobs if objective.ratio_from == "rollout" else logprobs.detach()
    policy_loss, clipped = clipped_surrogate(
        logprobs,
        old_logprobs,
        tokens.advantages,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    bonus = objective.entropy_bonus * entropy if objective.entropy_bonus else 0.0
    expert_loss = weighted_nll(logprobs, objective.expert_weight)
    loss = torch.where(
        tokens.is_expert, weights.expert * expert_loss, weights.policy * (policy_loss - bonus)
    ).sum()

    with torch.no_grad():
        expert = tokens.is_expert.to(logprobs.dtype)
        policy = 1.0 - expert
        p = logprobs.exp()
        gap = (logprobs - tokens.rollout_logprobs).abs() * policy
        sums = {
            "policy_loss": (policy_loss * policy).sum(),
            "expert_loss": (expert_loss * expert).sum(),
            "expert_nll": (-logprobs * expert).sum(),
            "expert_p": (p * expert).sum(),
            "expert_phi": (TOKEN_WEIGHTS["phi"](p) * expert).sum(),
            "entropy": (entropy * policy).sum(),
            "clip_fraction": (clipped * policy).sum(),
            "logprob_gap": gap.sum(),
        }
        maxima = {"logprob_gap_max": torch.cat([gap, gap.new_zeros(1)]).max()}
    return loss, sums, maxima
