"""Token ids -> the text that each of them adds, for people who read answers token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MOST_TOGETHER = 8
"""Tokens that may share one character: four bytes of UTF-8, with room for odd tokenizers."""


def pieces(
    token_ids: Sequence[int], logprobs: Sequence[float], decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, float]]:
    """(text, log-prob) for each token in order; joined, the texts are what ``decode`` gives for all of them.

    Tokens that hold only parts of a character come as one piece, with the sum of their log-probs. Each is decoded
    after the one before it, because tokenizers write a word's space differently at the start of a text.
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
