"""Thinking blocks of a turn, ``<think>...</think>``: those that a prompt opens, and how a template changes an
answer's."""

from __future__ import annotations

import re
from collections import Counter

from megatron_chord.records import Message

OPEN, CLOSE = "<think>", "</think>"
_EMPTY_BLOCK = re.compile(rf"\s*{OPEN}\s*{CLOSE}")


def opening(generation_prompt: str) -> str:
    """The block that a generation prompt opens but does not close, such as ``<think>\\n``; empty if there is none."""
    _, mark, rest = generation_prompt.rpartition(OPEN)
    return mark + rest if mark and CLOSE not in rest else ""


def thinks(message: Message) -> bool:
    """True if an assistant's message holds a thinking block that is not empty."""
    content = message["content"]
    return "reasoning_content" in message or (CLOSE in content and not _EMPTY_BLOCK.match(content))


def is_skipped(turn: str, message: Message) -> bool:
    """True if the rendered ``turn`` begins with an empty thinking block that ``message`` itself does not have."""
    return bool(_EMPTY_BLOCK.match(turn)) and not _EMPTY_BLOCK.match(message["content"])


def lost_part(turn: str, message: Message) -> str | None:
    """The part of an assistant's message that the rendered ``turn`` lacks, ignoring blanks; None if it lacks
    nothing."""
    content = message["content"]
    called = Counter(call["function"]["name"] for call in message.get("tool_calls", ()))
    if content in turn and "reasoning_content" not in message and not called:
        return None
    rendered = _without_blanks(turn)
    content = _EMPTY_BLOCK.sub("", content, count=1)
    answer = content.rpartition(CLOSE)[2]
    if _without_blanks(answer) not in rendered:
        return "text"
    if not all(_without_blanks(text) in rendered for text in (content, message.get("reasoning_content", ""))):
        return "thinking"
    lost = [name for name, count in called.items() if turn.count(name) < count]
    return f"call of `{lost[0]}`" if lost else None


def without_thinking(turn: str) -> str:
    """What an assistant's turn says after its last thinking block; the whole turn if it has none."""
    return turn.rpartition(CLOSE)[2].lstrip() if CLOSE in turn else turn


def _without_blanks(text: str) -> str:
    return "".join(text.split())
