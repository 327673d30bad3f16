"""The expert branch: negative log-likelihood of demonstrations, each token with a detached weight.

Without the stop-gradient on phi a rare expert token (p < 0.2356) would be pushed down, not up: the logit gradient
p(1-p)[(1-2p) ln p + 1-p] changes its sign there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOKEN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "p": lambda p: p,
    "phi": lambda p: p * (1 - p),
}
"""Weight of an expert token as a function of its probability p: plain SFT, importance-weighted SFT with
pi_sample = 1 (CHORD eq. 4; DFT), and CHORD's phi (eq. 5). phi is never renormalised."""


def weighted_nll(logprobs: Tensor, weight: str) -> Tensor:
    """-w(p) log p per token, w detached (CHORD eq. 1, 4 and 6). logprobs: [T]; returns [T]."""
    weights = TOKEN_WEIGHTS[weight](logprobs.detach().exp())
    return -weights * logprobs
