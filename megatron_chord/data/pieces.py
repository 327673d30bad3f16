"""The text that each token id adds, for a display of answers token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MOST_TOGETHER = 8
"""Largest number of tokens that share one character: four bytes of UTF-8, and a margin for unusual tokenizers."""


def pieces(
    token_ids: Sequence[int], logprobs: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, float]]:
    """(text, log-prob) for each token in order. The joined texts equal the output of ``decode`` for all tokens.

    Tokens that are only parts of a character are one piece, with the sum of their log-probs. Each token is decoded
    together with the previous one, because tokenizers write the space of a word differently at the start of a text.
    """
    found: list[tuple[str, float]] = []
    before: list[int] = []
    pending: list[int] = []
    total = 0.0
    for token, logprob in zip(token_ids, logprobs, strict=True):
        pending.append(token)
        total += logprob
        text = decode([*before, *pending])[len(decode(before)) if before else 0 :]
        if text.endswith("\ufffd") and len(pending) < _MOST_TOGETHER:
            continue
        found.append((text, total))
        before, pending, total = pending, [], 0.0
    if pending:
        found.append((decode([*before, *pending])[len(decode(before)) if before else 0 :], total))
    return found
