"""Log-probs and entropies of chosen tokens, and their best rivals, straight from hidden states.

The logits of a step ([tokens, vocabulary] in fp32) are the largest tensor a trainer could ever make: 8k tokens of a
152k vocabulary take 5 GB. Here they exist only for a chunk of tokens at a time, are reduced at once, and are computed
again in the backward pass. Works on a vocabulary shard: the tensor-parallel group is passed in. The matrix products
are torch's; what happens between them is ``losses.logit_kernels``.

Legend of shape suffixes: T tokens, C tokens of a chunk, H hidden size, V vocabulary, W rows of this rank's shard.
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
"""Default memory budget of one chunk's logits, and of what a kernel makes of them."""

CACHED_BYTES, CACHED_ROWS = 8 * 2**20, 1024
"""The same on a CPU, where kernels read the logits several times: what a cache holds, in tiles of so many rows
of the weight. That is 1024 tokens in fp32."""


def chunk_tokens(vocab_rows: int, budget_bytes: int = CHUNK_BYTES, *, bytes_per_logit: int) -> int:
    """Tokens whose logits over ``vocab_rows`` columns fit the budget. A kernel says what one logit takes."""
    return max(16, budget_bytes // (bytes_per_logit * max(vocab_rows, 1)))


class HeadOutput(NamedTuple):
    """What the head says of each target: [T] each, fp32 (fp64 for fp64 input), equal on every rank of the group."""

    logprobs: Tensor
    """log p(target)."""
    entropy: Tensor
    """Of the whole distribution, in nats."""
    rival: Tensor | None
    """max over v != target of log p(v), without a gradient; none unless asked for. With a vocabulary of one token
    there is no other, and it is -inf (p = 0)."""
    logit: Tensor | None = None
    """The target's own logit / temperature, without a gradient."""


def tile_for(
    hidden: Tensor, num_rows: int, kernels: LogitKernels, budget_bytes: int | None = None
) -> tuple[int, int]:
    """Tokens and rows of the weight whose logits live at a time: all rows on a GPU, what a cache holds on a CPU."""
    rows = num_rows if hidden.is_cuda else min(num_rows, CACHED_ROWS)
    budget = budget_bytes or (CHUNK_BYTES if hidden.is_cuda else CACHED_BYTES)
    return chunk_tokens(rows, budget, bytes_per_logit=kernels.bytes_per_logit(hidden.dtype)), max(rows, 1)


def kernels_for(logits: Tensor) -> LogitKernels:
    """Triton's kernels for logits on a GPU where Triton is installed, as it is with torch's CUDA builds; else torch."""
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
        hidden: [T, H], equal on every rank of ``group``. Its gradient is this shard's part of a sum over the group;
            the caller adds them up (Megatron's ``copy_to_tensor_model_parallel_region`` does).
        weight: [W, H], this rank's rows of the output embedding, without padding rows; W may be 0.
        targets: [T] int64, token ids of the whole vocabulary.
        first_row: vocabulary id of ``weight[0]``.
        temperature: what the logits are divided by, as in sampling: one number, or [T], each token's own.
        group: ranks that hold the other rows; none means all rows are here.
        chunk: tokens at a time; by default what ``tile_for`` says.
        rival: also give the log-prob of the best token other than the target. It costs one more maximum over each
            chunk's logits, no further product and no further matrix. Equal on all ranks of ``group``.
        kernels: what reduces and differentiates a chunk's logits; by default ``kernels_for`` chooses.

    Returns:
        log-probs [T] and entropies [T], differentiable with respect to hidden and weight, rivals [T] or none, and the
        targets' logits [T].

    Collectives on ``group``: 2 all-reduces in the forward pass ([T] max, with rivals [2, T]; [3, T] sum), none in the
    backward pass.
    """
    kernels = kernels or kernels_for(hidden)
    tokens, tile_rows = tile_for(hidden, len(weight), kernels)
    how = _How(
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
class _How:
    """What is not differentiated."""

    scale: float | Tensor
    """[T] where tokens have their own."""
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
        rows_T: Tensor,  # the targets as rows of this shard: outside of [0, W) where another rank holds them
        how: _How,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        num_tokens = hidden_TH.shape[0]
        dtype = _accumulator(hidden_TH.dtype)
        # Of this shard: log sum exp z; the target's logit (0 where another rank holds it); mean logit under softmax.
        target_T, mean_T = hidden_TH.new_zeros((2, num_tokens), dtype=dtype)
        lse_T = target_T.new_full((num_tokens,), -torch.inf)
        # And the largest logit but the target's: -inf where the shard has no other row.
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
        # The target's logit and the sum are rounded apart, so a certain token may come out above p = 1 by a last place.
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
        how: _How = ctx.how
        wide = _accumulator(hidden_TH.dtype)
        is_summed = how.tile_rows < len(weight_WH)  # over tiles; weights' gradients are summed over tokens
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
    """Each tile's tokens, its rows of the weight, and its logits, in one memory for all: valid until the next.

    Rows begin at multiples of 16 numbers, whatever W is: on a GPU, products and Triton's kernels are slower elsewhere.
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
    """total += left @ right, added up in ``total``'s type: in bf16 a sum of many chunks would stop growing."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # no product in left's type, which would be written, read and rounded
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
