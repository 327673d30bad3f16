"""Distillation of the policy towards a teacher, on tokens that the policy sampled, from two log-probs of each token.

    D = E over v ~ p of f(u),   u = p_T(v) / p(v)        p: the policy, p_T: the teacher, both after the same tokens

    divergence   D                                  f(u), never negative                    slope
    reverse_kl   KL(p || p_T)                       u - 1 - log u                           -log u
    forward_kl   KL(p_T || p)                       u log u - u + 1                         1 - u
    jsd          KL(p || m) / 2 + KL(p_T || m) / 2  (u log u - (1 + u) log((1 + u) / 2))/2  -log((1 + u) / 2) / 2
                 where m = (p + p_T) / 2

The gradient of D is the mean over v ~ p of slope x grad log p(v), because (f - u f') is the slope plus a constant, and
the mean of grad log p is 0. So the sampled token is enough for an unbiased estimate of the gradient, and no logits of
the teacher are needed. The estimate has more variance than a sum over the vocabulary. The slope of jsd is at most
log(2) / 2, and it falls slowly as u grows. That of forward_kl falls as -u: a token that the teacher likes far more than
the policy does dominates the step.

The teacher has no gradient. Neither has the distribution of the tokens on which D is taken: earlier tokens of an answer
are not made more or less likely because of the divergence at later ones. (The sampled-token losses of SDPO's code, of
TRL and of OPSD's code do the same, for reverse_kl.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_chord.losses.policy import MAX_LOG_RATIO


class Distilled(NamedTuple):
    loss: Tensor
    """[K]: its value is weight x f(u), its gradient weight x slope x grad log p"""
    log_ratio: Tensor
    """[K]: log u, limited to +- ``max_log_ratio``; detached"""
    weight: Tensor
    """[K]: the importance weight; detached"""


def distilled(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    divergence: str,
    max_ratio: float,
    max_log_ratio: float,
) -> Distilled:
    """The estimate of the divergence at each token, and of its gradient.

    The estimate needs tokens that the policy p sampled. Where other weights sampled them, with the log-probs
    ``old_logprobs``, it is multiplied by the constant min(p / p_old, ``max_ratio``).

    Args:
        logprobs: [K], differentiable; the others are constants.
        divergence: a key of ``DIVERGENCES``.
        max_log_ratio: limit of |log u|. It keeps one token, which the teacher finds impossible, from dominating a step.
    """
    with torch.no_grad():
        log_ratio = (teacher_logprobs - logprobs).clamp(-max_log_ratio, max_log_ratio)
        weight = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=max_ratio)
        value, slope = DIVERGENCES[divergence](log_ratio)
    loss = weight * (value + slope * (logprobs - logprobs.detach()))
    return Distilled(loss, log_ratio, weight)


def _reverse_kl(log_u: Tensor) -> tuple[Tensor, Tensor]:
    return log_u.expm1() - log_u, -log_u


def _forward_kl(log_u: Tensor) -> tuple[Tensor, Tensor]:
    return log_u.exp() * log_u - log_u.expm1(), -log_u.expm1()


def _jsd(log_u: Tensor) -> tuple[Tensor, Tensor]:
    log_mean = torch.nn.functional.softplus(log_u) - math.log(2)  # log((1 + u) / 2)
    u = log_u.exp()
    return (u * log_u - (1 + u) * log_mean) / 2, -log_mean / 2


DIVERGENCES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
}
"""Functions log u [K] -> (f(u) [K], slope [K]), by the name of the divergence."""
