"""Logit kernels in Triton: the forward kernel reads a chunk's logits once; the backward one reads and writes them once.

Both kernels together move 6 bytes for each bf16 logit; ``logit_kernels_torch`` moves 138. cuBLAS computes the matrix
products: it writes the logits and reads their gradient. Kernels that fuse everything into the products (Cut
Cross-Entropy, arXiv 2411.09009; verl; Liger) also avoid this traffic, but their products must then be as fast as
cuBLAS's. docs/performance.md compares the two approaches.

The kernels compute in fp32 and do not synchronise with the host. Addresses are 64-bit, because a chunk may have more
than 2^31 logits. Loads and stores are masked by the stride and not by the width: Triton vectorises them to 16 bytes
only if it can prove that the limit is a multiple of 16 numbers, and the size of a vocabulary need not be a multiple of
16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_chord.losses.logit_kernels import Reduced

REDUCE_BLOCK, REDUCE_WARPS = 4096, 8
"""Columns that a program reads at a time, and its number of warps: 16 fp32 numbers for each thread."""
DIFFERENTIATE_BLOCK, DIFFERENTIATE_WARPS = 2048, 4


def bytes_per_logit(dtype: torch.dtype) -> int:
    """The logits only; the kernels allocate no other matrix."""
    return dtype.itemsize


def reduce(logits_CW: Tensor, rows_C: Tensor, scale: float | Tensor, *, rival: bool) -> Reduced:
    tokens, width = logits_CW.shape
    found_4C = logits_CW.new_empty((4, tokens), dtype=torch.float32)
    _launch(
        _reduce,
        tokens,
        logits_CW,
        rows_C,
        found_4C,
        logits_CW.stride(0),
        width,
        scale,
        RIVAL=rival,
        PER_TOKEN=isinstance(scale, Tensor),
        BLOCK=REDUCE_BLOCK,
        num_warps=REDUCE_WARPS,
    )
    lse_C, target_C, mean_C, rival_C = found_4C
    return Reduced(lse_C, target_C, mean_C, rival_C if rival else None)


def differentiate_(
    logits_CW: Tensor,
    rows_C: Tensor,
    scale: float | Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    grad_logprobs_C: Tensor | None,
    grad_entropy_C: Tensor | None,
) -> None:
    tokens, width = logits_CW.shape
    none_C = torch.zeros_like(lse_C)
    of_tokens_4C = torch.stack(
        [
            lse_C,
            entropy_C,
            none_C if grad_logprobs_C is None else grad_logprobs_C,
            none_C if grad_entropy_C is None else grad_entropy_C,
        ]
    )
    _launch(
        _differentiate,
        tokens * -(-width // DIFFERENTIATE_BLOCK),  # rounded up
        logits_CW,
        rows_C,
        of_tokens_4C,
        logits_CW.stride(0),
        tokens,
        width,
        scale,
        PER_TOKEN=isinstance(scale, Tensor),
        BLOCK=DIFFERENTIATE_BLOCK,
        num_warps=DIFFERENTIATE_WARPS,
    )


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    kernel[(programs,)](*arguments, **options)


@triton.jit
def _reduce(  # noqa: PLR0913, PLR0917 (a kernel)
    logits,
    rows,
    found,
    stride,
    width,
    scale,
    RIVAL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce the logits of one token in each program.

    A block of logits has the shape [BLOCK / LANES, LANES]: a thread reads LANES adjacent logits in one load. Each
    thread keeps its own maximum and its own sums, and rescales the sums when the maximum grows (online softmax). So
    threads synchronise only at the end, and each logit costs little more than one exponential.
    """
    LANES: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # 16 bytes
    token = tl.program_id(0).to(tl.int64)
    line = logits + token * stride
    target = tl.load(rows + token).to(tl.int32)
    factor = tl.load(scale + token) if PER_TOKEN else scale
    offsets = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # Not -inf: if all logits of a thread lie beyond the width, -inf minus -inf would be NaN.
    top = tl.full([BLOCK // LANES], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK // LANES], tl.float32)
    weighted = tl.zeros([BLOCK // LANES], tl.float32)
    best = tl.full([BLOCK // LANES], -float("inf"), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + offsets
        inside = columns < width
        z = tl.load(line + columns, mask=columns < stride, other=0.0).to(tl.float32) * factor
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp(top - higher)
        e = tl.exp(z - higher[:, None])
        total = total * shrink + tl.sum(e, 1)
        # Beyond the width z is -inf and e is 0, and their product would be NaN.
        weighted = weighted * shrink + tl.sum(tl.where(inside, z * e, 0.0), 1)
        if RIVAL:
            best = tl.maximum(best, tl.max(tl.where(columns == target, -float("inf"), z), 1))
        top = higher
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    sum_exp = tl.sum(total * share, 0)
    here = (target >= 0) & (target < width)
    at_target = tl.load(line + target, mask=here, other=0.0).to(tl.float32) * factor
    tokens = tl.num_programs(0)
    tl.store(found + token, highest + tl.log(sum_exp))
    tl.store(found + tokens + token, at_target)
    tl.store(found + 2 * tokens + token, tl.sum(weighted * share, 0) / sum_exp)
    if RIVAL:
        tl.store(found + 3 * tokens + token, tl.max(best, 0))


@triton.jit
def _differentiate(  # noqa: PLR0913, PLR0917 (a kernel)
    logits,
    rows,
    of_tokens,
    stride,
    tokens,
    width,
    scale,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program computes one block of columns of one token. Adjacent programs compute adjacent blocks."""
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = columns < stride
    target = tl.load(rows + token).to(tl.int32)
    factor = tl.load(scale + token) if PER_TOKEN else scale
    lse = tl.load(of_tokens + token)
    entropy = tl.load(of_tokens + tokens + token)
    grad_logprobs = tl.load(of_tokens + 2 * tokens + token)
    grad_entropy = tl.load(of_tokens + 3 * tokens + token)
    place = logits + token * stride + columns
    logp = tl.load(place, mask=exists, other=0.0).to(tl.float32) * factor - lse
    grad = -tl.exp(logp) * (grad_logprobs + grad_entropy * (logp + entropy))
    grad += tl.where(columns == target, grad_logprobs, 0.0)
    tl.store(place, (grad * factor).to(logits.dtype.element_ty), mask=exists)
