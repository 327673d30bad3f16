"""Soft overlong punishment: long responses cost before the length limit cuts them."""

from __future__ import annotations


def overlong_penalty(length: int, *, limit: int, cache: int, factor: float = 1.0) -> float:
    """What DAPO (arXiv 2503.14476, eq. 13) adds to the reward of a response of `length` tokens.

    0 up to `limit` - `cache` tokens, from there falling linearly to -`factor` at `limit`; `cache` > 0.
    """
    excess = length - (limit - cache)
    return 0.0 if excess <= 0 else -factor * min(excess / cache, 1.0)
