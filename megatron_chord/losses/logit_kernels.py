"""Interface of the kernels that the log-prob head runs on a chunk of logits: one forward and one backward.

The forward kernel reduces the logits of a token to a few numbers. The backward kernel overwrites the logits with their
gradient. Both are limited by memory bandwidth. ``logit_kernels_torch`` is the reference: it runs on every device and
reads the logits many times. ``logit_kernels_triton`` reads them once.

z is a logit times ``scale``, and ``scale`` is 1 / temperature. Kernels compute in fp64 for fp64 logits and in fp32 for
all others. A scale is one number for all tokens, or a tensor [C] of that dtype with one number for each token.
Shape suffixes: C tokens of a chunk, W rows of this rank's shard of the vocabulary (at least one).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Reduced(NamedTuple):
    """One number for each token, reduced over this shard's rows: [C] each, in fp64 for fp64 logits, else fp32."""

    lse: Tensor
    """log sum exp z."""
    target: Tensor
    """z of the target; 0 if another shard holds the target."""
    mean: Tensor
    """Mean of z under softmax(z)."""
    rival: Tensor | None
    """The largest z of all rows except the target's; -inf if there is no other row. None unless requested."""


class LogitKernels(Protocol):
    """The functions that the modules ``logit_kernels_torch`` and ``logit_kernels_triton`` provide.

    ``logits_CW`` is finite. The numbers of a row are contiguous. The row stride may be larger than W. The memory of
    every row, also of the last one, reaches up to the stride, and a kernel may overwrite what lies beyond W.
    ``rows_C`` (int64) is the column of each target in the logits. It lies outside of [0, W) if another shard holds the
    target.
    """

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        """Peak memory for each logit: all [C, W] matrices that exist at the same time, including the logits.

        ``dtype`` is that of the logits.
        """
        ...

    def reduce(self, logits_CW: Tensor, rows_C: Tensor, scale: float | Tensor, *, rival: bool) -> Reduced:
        """Reduce the logits of each token. The content of ``logits_CW`` is undefined afterwards."""
        ...

    def differentiate_(
        self,
        logits_CW: Tensor,
        rows_C: Tensor,
        scale: float | Tensor,
        lse_C: Tensor,
        entropy_C: Tensor,
        grad_logprobs_C: Tensor | None,
        grad_entropy_C: Tensor | None,
    ) -> None:
        """Overwrite the logits with the gradient of the loss with respect to them, rounded to their dtype.

        With p = exp(z - lse), the gradient is
        scale x (grad_logprobs (1[target] - p) - grad_entropy p (log p + entropy)).
        lse and entropy are those of the whole vocabulary. A gradient that is None counts as 0.
        """
        ...
