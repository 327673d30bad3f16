"""The limit of the memory that a chunked log-prob head may need beyond its inputs. Benchmarks check it."""

from __future__ import annotations

LIBRARIES = 0.5e9
"""Bytes that libraries use for themselves: work space of matrix products, threads, and code that is loaded late."""
UNUSED = 0.1
"""The share that allocators leave unused between tensors."""


def head_limit(*, tokens: int, vocab: int, hidden: int, itemsize: int, tile_bytes: int) -> float:
    """Bytes for the gradients of hidden states [tokens, hidden] and weight [vocab, hidden], and one tile of logits.

    Numbers of less than 4 bytes are added up in FP32, which is there beside the result. A head that makes all logits
    needs at least 2 x tokens x vocab x 4 bytes more.

    Args:
        itemsize: bytes of one number of hidden states and weight.
        tile_bytes: logits of one tile and what is made of them.
    """
    each = itemsize if itemsize >= 4 else itemsize + 4
    gradients = (tokens + vocab) * hidden * each
    return (1 + UNUSED) * (gradients + tile_bytes) + LIBRARIES
