"""Finds truths that the mathematics grader can only compare as text: a right answer in other words would get 0."""

from __future__ import annotations

import re

from megatron_chord.rewards.answers import marked_answer

_NUMBER = re.compile(r"[-+$\s]*[0-9][0-9,. ]*[$\s]*")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{3,}(?![A-Za-z0-9])")
_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "mod",
        "gcd",
        "lcm",
        "max",
        "min",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
    ]
)
_OPTION = re.compile(r"\(?[A-Z][).:]\s*\S")
_FOREIGN = re.compile(r"[?!;]\s|[^\W\d_a-zA-Zα-ωΑ-Ω]{2,}")


def reads_as_text(truth: str, *, marker: str = "####") -> bool:
    """True if a truth is a sentence, or a number with several words.

    A single word (``Yes``, ``Friday``) does not count, because the same word is a right answer. A choice with its text
    (``C) 15``) does not count either: both its letter and its text are right. Only the letters are looked at; nothing
    is parsed.
    """
    marked = marked_answer(truth, marker)
    text = (truth if marked is None else marked).strip()
    if _NUMBER.fullmatch(text) or _OPTION.match(text):
        return False
    if _FOREIGN.search(text):
        return True
    words = set(_WORD.findall(_COMMAND.sub(" ", _TEXT.sub(" ", text)))) - _FUNCTIONS
    return len(words) >= 2
