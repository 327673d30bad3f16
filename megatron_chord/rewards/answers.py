"""Where a response says its final answer. Linear in the text, which is the model's."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(
    r"\\.|[{}]", re.DOTALL
)  # a backslash takes the next character with it: \{ and \} do not group


def has_answer(text: str, *, kind: str, marker: str = "####") -> bool:
    """Whether a response states an answer, where the grader `kind` looks for one. A loose number is none."""
    answer = marked_answer(text, marker) if kind == "math" else after_marker(text, marker)
    return bool(answer and answer.strip())


def marked_answer(text: str, marker: str) -> str | None:
    """Content of the last complete ``\\boxed{}``, else what follows the last `marker`."""
    boxed = last_boxed(text)
    return after_marker(text, marker) if boxed is None else boxed


def after_marker(text: str, marker: str) -> str | None:
    """What follows the last `marker`, up to the line's end."""
    _, found, rest = text.rpartition(marker)
    return first_line(rest) if found else None


def first_line(text: str) -> str:
    return (text.strip(" \t").splitlines() or [""])[0]


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces close."""
    closing, open_braces = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            closing[open_braces.pop()] = match.start()
    contents = [match.end() for match in _BOXED.finditer(text) if match.end() - 1 in closing]
    return text[contents[-1] : closing[contents[-1] - 1]] if contents else None
