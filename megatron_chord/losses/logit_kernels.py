"""What the log-prob head computes from a chunk of logits: one kernel for the forward pass, one for the backward pass.

Forward, the logits are reduced to a few numbers a token; backward, they become their own gradient, in place. Such work
takes as long as the bytes it moves. ``logit_kernels_torch``, the reference, runs anywhere and reads the logits many
times; ``logit_kernels_triton`` reads them once.

z is a logit times ``scale``, which is 1 / temperature, in the precision of the arithmetic: fp64 for fp64 logits, else
fp32. A scale is one number for all tokens, or [C] in that precision, each token's own. Legend of shape suffixes: C
tokens of a chunk, W rows of this rank's shard of the vocabulary, at least one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Reduced(NamedTuple):
    """Of each token, over this shard's rows: [C] each, in the precision of the arithmetic."""

    lse: Tensor
    """log sum exp z."""
    target: Tensor
    """The target's z; 0 where another shard holds it."""
    mean: Tensor
    """The mean z under softmax(z)."""
    rival: Tensor | None
    """The largest z but the target's, -inf where there is no other row; none unless asked for."""


class LogitKernels(Protocol):
    """What the modules ``logit_kernels_torch`` and ``logit_kernels_triton`` provide.

    ``logits_CW`` is finite, with adjacent numbers in a row. Rows may lie apart, by a stride of W or more, and behind
    every row, the last included, there is memory up to the stride, which may be overwritten. ``rows_C``, int64, has
    each target as a column of the logits: outside of [0, W) where another shard holds the target.
    """

    def bytes_per_logit(self, dtype: torch.dtype) -> int:
        """Of all matrices [C, W] that live at a time, the logits' own included. ``dtype`` is theirs."""
        ...

    def reduce(self, logits_CW: Tensor, rows_C: Tensor, scale: float | Tensor, *, rival: bool) -> Reduced:
        """What the logits hold afterwards is undefined."""
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
        """Puts the loss's gradient with respect to the logits in their place, rounded to their type.

        With p = exp(z - lse), that is scale x (grad_logprobs (1[target] - p) - grad_entropy p (log p + entropy)).
        lse and entropy are those of the whole vocabulary; a gradient that is none counts as 0.
        """
        ...
