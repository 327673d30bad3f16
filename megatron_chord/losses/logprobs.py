"""Log-probs and entropies of chosen tokens, and their best rivals, straight from hidden states.

The logits of a step ([tokens, vocabulary] in fp32) are the largest tensor a trainer could ever make: 8k tokens of a
152k vocabulary take 5 GB. Here they exist only for a chunk of tokens at a time, are reduced at once, and are computed
again in the backward pass. Works on a vocabulary shard: the tensor-parallel group is passed in.

Legend of shape suffixes: T tokens, C tokens of a chunk, H hidden size, V vocabulary, W rows of this rank's shard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20
"""Default memory budget of one chunk's logits and their exponentials, both fp32."""


def chunk_tokens(vocab_rows: int, budget_bytes: int = CHUNK_BYTES) -> int:
    """Tokens whose logits over ``vocab_rows`` columns fit the budget: two fp32 matrices live at a time."""
    return max(16, budget_bytes // (2 * 4 * max(vocab_rows, 1)))


class HeadOutput(NamedTuple):
    """What the head says of each target: [T] each, fp32 (fp64 for fp64 input), equal on every rank of the group."""

    logprobs: Tensor
    """log p(target)."""
    entropy: Tensor
    """Of the whole distribution, in nats."""
    rival: Tensor | None
    """max over v != target of log p(v), without a gradient; none unless asked for. With a vocabulary of one token
    there is no other, and it is -inf (p = 0)."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_row: int = 0,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    rival: bool = False,
) -> HeadOutput:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of the same distributions.

    Args:
        hidden: [T, H], equal on every rank of ``group``. Its gradient is this shard's part of a sum over the group;
            the caller adds them up (Megatron's ``copy_to_tensor_model_parallel_region`` does).
        weight: [W, H], this rank's rows of the output embedding, without padding rows; W may be 0.
        targets: [T] int64, token ids of the whole vocabulary.
        first_row: vocabulary id of ``weight[0]``.
        temperature: what the logits are divided by, as in sampling.
        group: ranks that hold the other rows; none means all rows are here.
        chunk: tokens at a time; by default what ``CHUNK_BYTES`` allows.
        rival: also give the log-prob of the best token other than the target. It costs one more maximum over each
            chunk's logits, no further product and no further matrix. Equal on all ranks of ``group``.

    Returns:
        log-probs [T] and entropies [T], differentiable with respect to hidden and weight, and rivals [T] or none.

    Collectives on ``group``: 2 all-reduces in the forward pass ([T] max, with rivals [2, T]; [3, T] sum), none in the
    backward pass.
    """
    chunk = chunk or chunk_tokens(weight.shape[0])
    rows = targets - first_row
    return HeadOutput(*_TokenLogprobs.apply(hidden, weight, rows, 1.0 / temperature, group, chunk, rival))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_WH: Tensor,
        rows_T: Tensor,  # the targets as rows of this shard: outside of [0, W) where another rank holds them
        scale: float,
        group: dist.ProcessGroup | None,
        chunk: int,
        rival: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_tokens, num_rows = hidden_TH.shape[0], weight_WH.shape[0]
        dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        # Of this shard: log sum exp z; the target's logit (0 where another rank holds it); mean logit under softmax.
        lse_T, target_T, mean_T = hidden_TH.new_zeros((3, num_tokens), dtype=dtype)
        # And the largest logit but the target's: -inf where the shard has no other row.
        rival_T = lse_T.new_full((num_tokens,), -torch.inf) if rival else None
        here_T = (rows_T >= 0) & (rows_T < num_rows)
        rows_T = rows_T.clamp(0, max(num_rows - 1, 0))
        if num_rows == 0:
            lse_T.fill_(-torch.inf)
        else:
            for piece in _slices(num_tokens, chunk):
                z_CW = _logits(hidden_TH[piece], weight_WH, scale, dtype)
                target_T[piece] = z_CW.gather(1, rows_T[piece, None]).squeeze(1)
                top_C1 = z_CW.amax(1, keepdim=True)
                e_CW = (z_CW - top_C1).exp_()
                sum_C = e_CW.sum(1)
                lse_T[piece] = top_C1.squeeze(1) + sum_C.log()
                mean_T[piece] = torch.bmm(e_CW[:, None, :], z_CW[:, :, None]).flatten() / sum_C
                if rival_T is not None:
                    # z_CW has served; take out of it, in place, those targets that are here.
                    others_C = target_T[piece].masked_fill(here_T[piece], -torch.inf)
                    rival_T[piece] = z_CW.scatter_(1, rows_T[piece, None], others_C[:, None]).amax(1)
                del z_CW, e_CW  # or they would live on beside the next chunk's
            target_T *= here_T
        if group is not None and group.size() > 1 and num_tokens > 0:
            top_T = lse_T.clone() if rival_T is None else torch.stack([lse_T, rival_T])
            dist.all_reduce(top_T, dist.ReduceOp.MAX, group=group)
            if rival_T is not None:
                top_T, rival_T = top_T
            share_T = (lse_T - top_T).exp()
            parts_3T = torch.stack([share_T, target_T, share_T * mean_T])
            dist.all_reduce(parts_3T, group=group)
            share_T, target_T, weighted_T = parts_3T
            lse_T = top_T + share_T.log()
            mean_T = weighted_T / share_T
        logprobs_T = target_T - lse_T
        entropy_T = lse_T - mean_T
        if rival_T is not None:
            rival_T = rival_T - lse_T
            ctx.mark_non_differentiable(rival_T)
        ctx.save_for_backward(hidden_TH, weight_WH, rows_T, here_T, lse_T, entropy_T)
        ctx.scale, ctx.chunk, ctx.dtype = scale, chunk, dtype
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T, rival_T

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_WH, rows_T, here_T, lse_T, entropy_T = ctx.saved_tensors
        grad_hidden_TH = torch.zeros_like(hidden_TH)
        grad_weight_WH = torch.zeros_like(weight_WH, dtype=ctx.dtype)
        if weight_WH.shape[0] > 0:
            for piece in _slices(hidden_TH.shape[0], ctx.chunk):
                hidden_CH = hidden_TH[piece]
                logp_CW = _logits(hidden_CH, weight_WH, ctx.scale, ctx.dtype).sub_(lse_T[piece, None])
                p_CW = logp_CW.exp()
                if grad_entropy_T is not None:  # dH/dz = -p (log p + H)
                    grad_CW = (
                        logp_CW.add_(entropy_T[piece, None]).mul_(p_CW).mul_(-grad_entropy_T[piece, None])
                    )
                else:
                    grad_CW = logp_CW.zero_()
                if grad_logprobs_T is not None:  # dl/dz = 1[target] - p
                    grad_C1 = grad_logprobs_T[piece, None]
                    grad_CW.addcmul_(p_CW, grad_C1, value=-1)
                    grad_CW.scatter_add_(1, rows_T[piece, None], grad_C1 * here_T[piece, None])
                grad_CW = grad_CW.mul_(ctx.scale).to(hidden_TH.dtype)
                grad_hidden_TH[piece] = grad_CW @ weight_WH
                if grad_CW.dtype == ctx.dtype:
                    grad_weight_WH.addmm_(grad_CW.t(), hidden_CH)
                else:
                    grad_weight_WH += grad_CW.t() @ hidden_CH
                del logp_CW, p_CW, grad_CW  # as in the forward pass
        return grad_hidden_TH, grad_weight_WH.to(weight_WH.dtype), None, None, None, None, None


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _logits(hidden_CH: Tensor, weight_WH: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (hidden_CH @ weight_WH.t()).to(dtype).mul_(scale)
