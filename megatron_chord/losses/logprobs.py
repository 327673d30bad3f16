"""Log-probs and entropies of target tokens, and log-probs of the best other token, computed from hidden states.

The logits of a step ([tokens, vocabulary] in fp32) would be the largest tensor of a trainer: 8k tokens with a
vocabulary of 152k take 5 GB. Here logits exist only for one chunk of tokens at a time. They are reduced immediately and
computed again in the backward pass. The functions work on a vocabulary shard; the caller passes the tensor-parallel
group. torch computes the matrix products, and ``losses.logit_kernels`` computes what lies between them.

Shape suffixes: T tokens, C tokens of a chunk, H hidden size, V vocabulary, W rows of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_chord.losses import logit_kernels_torch
from megatron_chord.losses.logit_kernels import LogitKernels

CHUNK_BYTES = 256 * 2**20
"""Default memory budget of one chunk: its logits and the intermediate matrices of the kernel."""

CACHED_BYTES, CACHED_ROWS = 8 * 2**20, 1024
"""Budget on a CPU, and rows of the weight in a tile. Kernels on a CPU read the logits several times, so a tile should
fit the cache. In fp32 a tile has 1024 tokens."""


def chunk_tokens(vocab_rows: int, budget_bytes: int = CHUNK_BYTES, *, bytes_per_logit: int) -> int:
    """Number of tokens whose logits over ``vocab_rows`` columns fit the budget.

    ``bytes_per_logit`` is what the kernel needs for one logit (``LogitKernels.bytes_per_logit``).
    """
    return max(16, budget_bytes // (bytes_per_logit * max(vocab_rows, 1)))


class HeadOutput(NamedTuple):
    """The head's results for each target: [T] each, fp32 (fp64 for fp64 input), equal on every rank of the group."""

    logprobs: Tensor
    """log p(target)."""
    entropy: Tensor
    """Entropy of the distribution over the whole vocabulary, in nats."""
    rival: Tensor | None
    """max over v != target of log p(v), without a gradient. None unless requested. -inf (p = 0) if the vocabulary has
    only one token."""
    logit: Tensor | None = None
    """The target's logit / temperature, without a gradient."""


def tile_for(
    hidden: Tensor, num_rows: int, kernels: LogitKernels, budget_bytes: int | None = None
) -> tuple[int, int]:
    """Number of tokens and of weight rows in a tile. A tile's logits exist at the same time.

    On a GPU a tile has all rows of the weight; on a CPU it has as many as fit a cache.
    """
    rows = num_rows if hidden.is_cuda else min(num_rows, CACHED_ROWS)
    budget = budget_bytes or (CHUNK_BYTES if hidden.is_cuda else CACHED_BYTES)
    return chunk_tokens(rows, budget, bytes_per_logit=kernels.bytes_per_logit(hidden.dtype)), max(rows, 1)


def kernels_for(logits: Tensor) -> LogitKernels:
    """The Triton kernels if the logits are on a GPU and Triton is installed (CUDA builds of torch bring it), else
    torch.

    fp64 logits always use the torch kernels.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and find_spec("triton") is not None:
        from megatron_chord.losses import logit_kernels_triton

        return logit_kernels_triton
    return logit_kernels_torch


def token_logprobs(  # noqa: PLR0913 (the last is for tests and benchmarks)
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_row: int = 0,
    temperature: float | Tensor = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    rival: bool = False,
    kernels: LogitKernels | None = None,
) -> HeadOutput:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of the same distributions.

    Args:
        hidden: [T, H], equal on every rank of ``group``. Its gradient is only this shard's summand; the caller sums
            it over the group (Megatron's ``copy_to_tensor_model_parallel_region`` does so).
        weight: [W, H], this rank's rows of the output embedding, without padding rows; W may be 0.
        targets: [T] int64, token ids of the whole vocabulary.
        first_row: vocabulary id of ``weight[0]``.
        temperature: the logits are divided by it, as in sampling. One number, or [T] with one number for each token.
        group: ranks that hold the other rows; None means that this rank holds all rows.
        chunk: number of tokens at a time; the default is that of ``tile_for``.
        rival: also return the log-prob of the best token other than the target. This costs one more maximum over each
            chunk's logits, no further product and no further matrix. Equal on all ranks of ``group``.
        kernels: the kernels that reduce and differentiate a chunk's logits; the default is that of ``kernels_for``.

    Returns:
        log-probs [T] and entropies [T], differentiable with respect to hidden and weight; log-probs of the best other
        tokens [T] or None; the targets' logits [T].

    Collectives on ``group``: 2 all-reduces in the forward pass ([T] max, with rivals [2, T]; [3, T] sum), none in the
    backward pass.
    """
    kernels = kernels or kernels_for(hidden)
    tokens, tile_rows = tile_for(hidden, len(weight), kernels)
    how = _HeadOptions(
        scale=(
            temperature.to(_accumulator(hidden.dtype)).reciprocal()
            if isinstance(temperature, Tensor)
            else 1.0 / temperature
        ),
        group=group,
        chunk=chunk or tokens,
        tile_rows=tile_rows,
        rival=rival,
        kernels=kernels,
    )
    return HeadOutput(*_TokenLogprobs.apply(hidden, weight, targets - first_row, how))


@dataclass(frozen=True, kw_only=True)
class _HeadOptions:
    """The inputs of the head that have no gradient."""

    scale: float | Tensor
    """1 / temperature; [T] if each token has its own."""
    group: dist.ProcessGroup | None
    chunk: int
    tile_rows: int
    rival: bool
    kernels: LogitKernels

    def scale_of(self, piece: slice) -> float | Tensor:
        return self.scale[piece] if isinstance(self.scale, Tensor) else self.scale


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_WH: Tensor,
        rows_T: Tensor,  # the targets as rows of this shard: outside of [0, W) if another rank holds them
        how: _HeadOptions,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        num_tokens = hidden_TH.shape[0]
        dtype = _accumulator(hidden_TH.dtype)
        # For this shard: log sum exp z; the target's logit (0 if another rank holds it); mean logit under softmax.
        target_T, mean_T = hidden_TH.new_zeros((2, num_tokens), dtype=dtype)
        lse_T = target_T.new_full((num_tokens,), -torch.inf)
        # The largest logit except the target's: -inf if the shard has no other row.
        rival_T = lse_T.clone() if how.rival else None
        for piece, tile, logits_CW in _logits(hidden_TH, weight_WH, how.chunk, how.tile_rows):
            found = how.kernels.reduce(
                logits_CW, rows_T[piece] - tile.start, how.scale_of(piece), rival=how.rival
            )
            lse_C = torch.logaddexp(lse_T[piece], found.lse)
            mean_T[piece] *= (lse_T[piece] - lse_C).exp()
            mean_T[piece] += found.mean * (found.lse - lse_C).exp()
            lse_T[piece] = lse_C
            target_T[piece] += found.target
            if rival_T is not None and found.rival is not None:
                rival_T[piece] = torch.maximum(rival_T[piece], found.rival)
        if how.group is not None and how.group.size() > 1 and num_tokens > 0:
            top_T = lse_T.clone() if rival_T is None else torch.stack([lse_T, rival_T])
            dist.all_reduce(top_T, dist.ReduceOp.MAX, group=how.group)
            if rival_T is not None:
                top_T, rival_T = top_T
            share_T = (lse_T - top_T).exp()
            parts_3T = torch.stack([share_T, target_T, share_T * mean_T])
            dist.all_reduce(parts_3T, group=how.group)
            share_T, target_T, weighted_T = parts_3T
            lse_T = top_T + share_T.log()
            mean_T = weighted_T / share_T
        # The target's logit and the sum are rounded separately, so p of a certain token could exceed 1 by rounding.
        logprobs_T = (target_T - lse_T).clamp_(max=0)
        entropy_T = (lse_T - mean_T).clamp_(min=0)
        if rival_T is not None:
            rival_T = (rival_T - lse_T).clamp_(max=0)
        ctx.mark_non_differentiable(target_T, *(() if rival_T is None else (rival_T,)))
        ctx.save_for_backward(hidden_TH, weight_WH, rows_T, lse_T, entropy_T)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T, rival_T, target_T

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_WH, rows_T, lse_T, entropy_T = ctx.saved_tensors
        how: _HeadOptions = ctx.how
        wide = _accumulator(hidden_TH.dtype)
        # hidden's gradient is a sum over tiles if there are several; weight's gradient is always a sum over chunks.
        is_summed = how.tile_rows < len(weight_WH)
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=wide if is_summed else None)
        grad_weight_WH = torch.zeros_like(weight_WH, dtype=wide)
        for piece, tile, logits_CW in _logits(hidden_TH, weight_WH, how.chunk, how.tile_rows):
            how.kernels.differentiate_(
                logits_CW,
                rows_T[piece] - tile.start,
                how.scale_of(piece),
                lse_T[piece],
                entropy_T[piece],
                None if grad_logprobs_T is None else grad_logprobs_T[piece],
                None if grad_entropy_T is None else grad_entropy_T[piece],
            )
            _add_product(grad_hidden_TH[piece], logits_CW, weight_WH[tile])
            _add_product(grad_weight_WH[tile], logits_CW.t(), hidden_TH[piece])
        return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_WH.to(weight_WH.dtype), None, None


def _logits(
    hidden_TH: Tensor, weight_WH: Tensor, chunk: int, tile_rows: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the token range, the weight's row range and the logits of each tile.

    All tiles share one buffer, so logits are valid only until the next tile. Every row starts at a multiple of 16
    numbers, for any W: on a GPU, products and Triton's kernels are slower on rows that are not aligned.
    """
    num_tokens, num_rows = len(hidden_TH), len(weight_WH)
    memory = hidden_TH.new_empty((min(chunk, num_tokens), -(-min(tile_rows, num_rows) // 16) * 16))
    for start in range(0, num_tokens, chunk):
        piece = slice(start, min(start + chunk, num_tokens))
        for first in range(0, num_rows, tile_rows):
            tile = slice(first, min(first + tile_rows, num_rows))
            logits_CW = memory[: piece.stop - start, : tile.stop - first]
            yield piece, tile, torch.mm(hidden_TH[piece], weight_WH[tile].t(), out=logits_CW)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in the dtype of ``total``: in bf16 a sum of many chunks would stop growing."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # the product is not written in left's dtype first, which would round it
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
