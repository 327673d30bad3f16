"""Inputs of the log-prob head."""

from __future__ import annotations

import torch
from torch import Tensor


def head_inputs(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float64, *, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random hidden states, weight and targets. The logits have a standard deviation of about ``scale``.

    The first two targets are the first and the last row of the weight.
    """
    torch.manual_seed(tokens + vocab)
    states = torch.randn(tokens, hidden, dtype=torch.float64)
    weight = scale * hidden**-0.5 * torch.randn(vocab, hidden, dtype=torch.float64)
    targets = torch.randint(vocab, (tokens,))
    targets[: min(2, tokens)] = torch.tensor([0, vocab - 1])[:tokens]
    return states.to(dtype), weight.to(dtype), targets
