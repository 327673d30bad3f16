"""The tokens of a conversation as text, and which of them the chat template wrote by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_chord.data.observed import Observed
from megatron_chord.data.templates import ChatTemplate

_MAX_PENDING = 8
"""Largest number of tokens of one character."""


@dataclass(frozen=True)
class TokenText:
    token_id: int
    text: str
    """Empty if the token is a part of a character: the last token of the character has the text."""
    is_trained: bool
    is_template: bool
    """True if the template wrote it: it contains no text of a message."""


@dataclass(frozen=True)
class RenderedTokens:
    tokens: tuple[TokenText, ...]
    rewritten: tuple[int, ...]
    """Messages (from 0) whose text is not in the rendered conversation as it was written."""


def rendered_tokens(template: ChatTemplate, seen: Observed) -> RenderedTokens:
    """The tokens of ``seen``, in order. The texts together are the rendered conversation."""
    texts = token_texts(template, seen.token_ids)
    trainable = seen.trainable or (False,) * len(texts)
    is_control = [token in template.control_tokens for token in seen.token_ids]
    own, rewritten = _written_by_template(texts, is_control, trainable, seen)
    tokens = [TokenText(*values) for values in zip(seen.token_ids, texts, trainable, own, strict=True)]
    return RenderedTokens(tuple(tokens), rewritten)


def token_texts(template: ChatTemplate, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the text of those before it.

    A token is decoded together with the previous one, since SentencePiece drops the space of a first token. A token
    inside a character adds no text until the character is complete.
    """
    texts: list[str] = []
    context: list[int] = []
    pending: list[int] = []
    for token in token_ids:
        control = template.control_tokens.get(token)
        if control is not None:
            if pending:
                texts[-1] = template.decode(pending)
            texts.append(control)
            context, pending = [], []
            continue
        pending.append(token)
        before = template.decode(context)
        added = template.decode([*context, *pending])[len(before) :]
        if added.endswith("\ufffd") and len(pending) < _MAX_PENDING:
            texts.append("")
            continue
        texts.append(added)
        context, pending = pending, []
    if pending:
        texts[-1] = template.decode(pending)
    return texts


def _written_by_template(
    texts: Sequence[str], is_control: Sequence[bool], trainable: Sequence[bool], seen: Observed
) -> tuple[list[bool], tuple[int, ...]]:
    """Which tokens share no character with a message, and the messages that are not found.

    The messages are searched one after another. Control tokens are never part of a message. An assistant's message is
    searched only in trained tokens, other messages only outside of them.
    """
    own = [True] * len(texts)
    starts, total = [], 0
    for text in texts:
        starts.append(total)
        total += len(text)
    has_mask = any(trainable)
    blocked = {
        side: "".join(
            "\0" * len(text) if control or (has_mask and trained != side) else text
            for text, control, trained in zip(texts, is_control, trainable, strict=True)
        )
        for side in {False, has_mask}
    }
    rewritten: list[int] = []
    position = token = 0
    for index, message in enumerate(seen.messages):
        text = blocked[has_mask and message["role"] == "assistant"]
        content = message["content"].strip()
        found = text.find(content, position)
        if found < 0:
            rewritten.append(index)
            continue
        position = found + len(content)
        while token < len(texts) and starts[token] < position:
            if max(starts[token] + len(texts[token]), starts[token] + 1) > found:
                own[token] = False
            token += 1
    return own, tuple(rewritten)
