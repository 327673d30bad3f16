"""Logit kernels in plain torch operations: the reference implementation, and the one that CPUs use."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_chord.losses.logit_kernels import Reduced


def bytes_per_logit(dtype: torch.dtype) -> int:
    """z and one more matrix, in fp64 for fp64 logits, else fp32. z reuses the logits' memory if the dtype is equal."""
    wide = _wide(dtype)
    return 2 * wide.itemsize + (0 if wide == dtype else dtype.itemsize)


def reduce(logits_CW: Tensor, rows_C: Tensor, scale: float | Tensor, *, rival: bool) -> Reduced:
    z_CW = logits_CW.to(_wide(logits_CW.dtype)).mul_(_column(scale))
    here_C, index_C1 = _locate(rows_C, z_CW.shape[1])
    target_C = z_CW.gather(1, index_C1).squeeze(1)
    top_C1 = z_CW.amax(1, keepdim=True)
    e_CW = (z_CW - top_C1).exp_()
    sum_C = e_CW.sum(1)
    lse_C = top_C1.squeeze(1) + sum_C.log()
    # Not a dot product of e and z: with fp32 and sequential addition of 152k terms its error is about 1e-3.
    mean_C = e_CW.mul_(z_CW).sum(1) / sum_C
    rival_C = None
    if rival:
        # z_CW is not needed any more: overwrite it at the targets that this shard holds.
        others_C = target_C.masked_fill(here_C, -torch.inf)
        rival_C = z_CW.scatter_(1, index_C1, others_C[:, None]).amax(1)
    return Reduced(lse_C, target_C * here_C, mean_C, rival_C)


def differentiate_(
    logits_CW: Tensor,
    rows_C: Tensor,
    scale: float | Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    grad_logprobs_C: Tensor | None,
    grad_entropy_C: Tensor | None,
) -> None:
    logp_CW = logits_CW.to(_wide(logits_CW.dtype)).mul_(_column(scale)).sub_(lse_C[:, None])
    p_CW = logp_CW.exp()
    if grad_entropy_C is not None:  # dH/dz = -p (log p + H)
        grad_CW = logp_CW.add_(entropy_C[:, None]).mul_(p_CW).mul_(-grad_entropy_C[:, None])
    else:
        grad_CW = logp_CW.zero_()
    if grad_logprobs_C is not None:  # dl/dz = 1[target] - p
        here_C, index_C1 = _locate(rows_C, p_CW.shape[1])
        grad_CW.addcmul_(p_CW, grad_logprobs_C[:, None], value=-1)
        grad_CW.scatter_add_(1, index_C1, (grad_logprobs_C * here_C)[:, None])
    logits_CW.copy_(grad_CW.mul_(_column(scale)))


def _column(scale: float | Tensor) -> float | Tensor:
    return scale[:, None] if isinstance(scale, Tensor) else scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _locate(rows_C: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return whether this shard holds each target [C], and a valid column [C, 1] to read for it.

    If another shard holds the target, the column is an arbitrary valid one.
    """
    here_C = (rows_C >= 0) & (rows_C < width)
    return here_C, rows_C.clamp(0, width - 1)[:, None]
