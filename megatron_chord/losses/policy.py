"""The on-policy branch: group advantages and the clipped surrogate of GRPO (CHORD, arXiv 2508.11408, eq. 2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 so that one broken token cannot overflow the exponential."""


def group_advantages(rewards: Sequence[float], *, use_std: bool, eps: float) -> tuple[float, ...]:
    """(R - mean) / (std + eps) within one prompt's group; without ``use_std`` R - mean.

    The standard deviation is the unbiased one (divisor n - 1). Equal rewards give exactly 0.
    """
    mean = statistics.fmean(rewards)
    if max(rewards) == min(rewards):
        return (0.0,) * len(rewards)
    scale = statistics.stdev(rewards) + eps if use_std else 1.0
    return tuple((reward - mean) / scale for reward in rewards)


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token, with r = exp(logprobs - old_logprobs).

    Args:
        logprobs: [T], the policy's, differentiable. ``old_logprobs``, ``advantages``: [T] constants.

    Returns:
        the loss [T], and [T] bool: the clip is active (its gradient is 0).
    """
    ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = advantages.detach()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), (clipped < unclipped).detach()
