"""Other log-prob heads, with which ours is compared. Each is a function of the same arguments.

``hidden`` [T, H] and ``weight`` [V, H] with gradients, ``targets`` [T] -> log-probs [T], and entropies [T] or none.

* **checkpointed chunks** use torch alone: ``log_softmax`` of 1024 tokens at a time under ``torch.utils.checkpoint``, so
  that the backward pass computes a chunk's logits again.
* **TRL**: ``trl.kernels.chunked_logprob.ChunkedLogProbFunction`` as its GRPOTrainer calls it: tiles of 4096 tokens and
  32,768 columns; Triton on a GPU, torch without one.
* **Liger**: the log-prob computation of ``LigerFusedLinearGRPOLoss``, with tiles of 2048 tokens and 4096 columns. It
  gives no entropy, so it does less.

TRL and Liger are optional: ``available()`` names what is installed. None of these (``HEADS``) holds the whole logits.
``naive`` holds them. ``products`` computes only the matrix products.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

CHUNK_TOKENS = 1024
TRL_COLUMNS = 32_768
"""trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE of trl 1.16.0. Importing that module would load all of TRL."""
LIGER_COLUMNS = 4096


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the whole logits [T, V]. autograd keeps what it needs of them."""
    full = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    return full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)


def products(hidden: Tensor, weight: Tensor, tile: tuple[int, int]) -> float:
    """Compute only the matrix products that every chunked head needs. ``tile`` is a number of tokens and of weight
    rows."""
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    total = 0.0
    for piece in hidden.split(tile[0]):
        for rows in weight.split(tile[1]):
            total += float((piece @ rows.t())[0, 0])
    for piece, grad_piece in zip(hidden.split(tile[0]), grad_hidden.split(tile[0]), strict=True):
        for rows, grad_rows in zip(weight.split(tile[1]), grad_weight.split(tile[1]), strict=True):
            logits = piece @ rows.t()
            grad_piece.addmm_(logits, rows)
            grad_rows.addmm_(logits.t(), piece)
    return total


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    def of_chunk(piece: Tensor, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        full = torch.log_softmax((piece @ weight.t()).float(), dim=-1)
        return full.gather(1, wanted[:, None])[:, 0], -(full.exp() * full).sum(-1)

    parts = [
        checkpoint(of_chunk, piece, wanted, weight, use_reentrant=False)
        for piece, wanted in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy")
    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_COLUMNS, None, 1.0, outputs)
    return found[0], found[1]


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, LIGER_COLUMNS), None


HEADS: dict[str, Head] = {"checkpointed": checkpointed, "trl": trl, "liger": liger}
LABELS = {"checkpointed": "checkpointed chunks", "trl": "TRL's head", "liger": "Liger's, no entropy"}
PACKAGES = {"trl": "trl", "liger": "liger_kernel"}


def available() -> list[str]:
    """Return the names of HEADS whose package is installed."""
    return [
        name for name in HEADS if name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None
    ]
