"""The text and the log-prob of each token of an answer, for people who read answers token by token."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chord.data.templates import ChatTemplate
from megatron_chord.data.token_texts import token_texts


def pieces(
    template: ChatTemplate, token_ids: Sequence[int], logprobs: Sequence[float]
) -> list[tuple[str, float]]:
    """(text, log-prob) for each token in order; the texts together are the answer with its control tokens.

    Tokens that hold only parts of a character come as one piece, with the sum of their log-probs. A token without text
    belongs to the piece after it, or is a piece at the end.
    """
    found: list[tuple[str, float]] = []
    waiting: list[float] = []
    for text, logprob in zip(token_texts(template, token_ids), logprobs, strict=True):
        waiting.append(logprob)
        if text:
            found.append((text, sum(waiting)))
            waiting = []
    return [*found, ("", sum(waiting))] if waiting else found
