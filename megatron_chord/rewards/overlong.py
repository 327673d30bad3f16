"""Soft overlong punishment: long responses lose reward before they reach the length limit."""

from __future__ import annotations


def overlong_penalty(length: int, *, limit: int, cache: int, factor: float = 1.0) -> float:
    """The number that DAPO (arXiv 2503.14476, eq. 13) adds to the reward of a response of `length` tokens.

    It is 0 up to `limit` - `cache` tokens and falls linearly from there to -`factor` at `limit`; `cache` > 0.
    """
    excess = length - (limit - cache)
    return 0.0 if excess <= 0 else -factor * min(excess / cache, 1.0)
