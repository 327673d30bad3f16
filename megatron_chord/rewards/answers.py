"""Finds the final answer of a response. Every search takes linear time, because the text comes from the model."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash escapes the next character: \{ and \} do not group
_THINK_END = "</think>"
_TAIL = 20_000  # unmarked answers are searched in this many characters at the end
_ANSWER_START, _ANSWER_END = "<answer>", "</answer>"

_SPACING = r"(?:\s|\$|\\[()\[\],;:! ]|\\q?quad\b|[*&.,;:•-]|\\\\)"
_AND = r"(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)"
_LABEL = r"(?:\(?[a-h]\)|[a-zA-Z](?:_\{?\w\}?)?\s*=)"
_BETWEEN_BOXES = re.compile(
    rf"{_SPACING}{{0,20}}(?:{_AND}{_SPACING}{{0,20}})?(?:{_LABEL}{_SPACING}{{0,10}})?"
)
_CORRECTION = re.compile(
    r"\b(?:no|not|wait|actually|instead|rather|mistake|wrong|incorrect|oops|correction|recheck|hmm)\b",
    re.IGNORECASE,
)

_PHRASE = re.compile(
    r"\b(?:answers?|(?:correct|right|best)\s{1,3}(?:option|choice))\b\**"
    r"(?:[^\n.:=]{0,40}?\b(?:is|are|be)\b|\s{0,3}(?=[:=\n]))\s{0,3}[:=]?\**:?",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\**(?:(?:option|choice)\s+)?(?:\\text(?:bf)?\{)?\(?([A-J])\)?\}?\**\s*(?:[.:,)]|$)")
_REASON = re.compile(r"[.?](?:\s|$)|,?\s\b(?:because|since|as|so|which|where|when|after)\b")
_WORD = re.compile(r"[A-Za-z]{3,}")
_MATH = re.compile(
    r"(?<!\\)\$\$([^$]{1,2000})\$\$|(?<![\\$])\$(?=[^\s$])((?:\\\$|[^$\n]){1,1000}?)(?<=[^\s\\])\$(?![\d$])"
    r"|\\\(((?:[^\\]|\\(?!\))){1,1000}?)\\\)|\\\[((?:[^\\]|\\(?!\])){1,2000}?)\\\]"
)
_DIGITS = r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)"
_LOOSE_OPTION = re.compile(r"\(([A-J])\)|\b(?:option|choice)\s+([A-J])\b|^\W*([A-J])\W*$")
_NUMBER = re.compile(
    rf"(?:(?<![\w)])[-\u2212])?(?:[0-9]+ (?=[0-9]+/[0-9]))?(?:{_DIGITS}√|√)?"
    rf"{_DIGITS}(?:[/^]-?{_DIGITS})*(?:\s?\\?%|\s?°)?"
)


@dataclass(frozen=True)
class Stated:
    """A response's final answer."""

    text: str
    """The answer as it is written. Several boxes side by side are joined by commas."""
    boxes: tuple[str, ...] = ()
    """The boxes of the passage in which it was found, in order, without duplicates; empty after a change of mind."""


def marked_answer(text: str, marker: str) -> str | None:
    """The answer in a tag, in a box or after the marker: `stated_answer` without loose answers."""
    stated = stated_answer(text, marker, loose=False)
    return None if stated is None else stated.text


def stated_answer(text: str, marker: str, *, loose: bool = True) -> Stated | None:
    """The final answer of a response; None if there is none.

    The text after the last ``</think>`` is read first. The whole text is read only if no answer is found there. Within
    a passage the order is: the last ``<answer>...</answer>``; the last ``\\boxed{...}`` whose braces close, with its
    neighbours; the line after the last `marker`. With `loose` two more follow: the text after the last "answer is" or
    "Answer:", which also occurs in reasoning; the last formula or number.
    """
    for passage in _passages(text):
        found = _marked(passage, marker)
        if found is None and loose:
            tail = passage[-_TAIL:]
            found = _after_phrase(tail) or _loose(tail)
        if found is not None:
            return found
    return None


def after_marker(text: str, marker: str) -> str | None:
    """The text after the last `marker`, up to the end of the line."""
    _, found, rest = text.rpartition(marker)
    return first_line(rest) if found else None


def first_line(text: str) -> str:
    return (text.strip(" \t").splitlines() or [""])[0]


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces close."""
    boxes = _boxes(text)
    return text[slice(*boxes[-1][1])] if boxes else None


def _passages(text: str) -> Iterator[str]:
    _, thought, rest = text.rpartition(_THINK_END)
    if thought and rest.strip():
        yield rest
    yield text


def _marked(text: str, marker: str) -> Stated | None:
    inner = _between_tags(text)
    if inner is not None:
        return (
            _marked(inner, marker) or _short(inner) or _after_phrase(inner[-_TAIL:]) or _loose(inner[-_TAIL:])
        )
    found = _boxed(text)
    if found is not None:
        return found
    line = after_marker(text, marker)
    if line is not None:
        return Stated(line)
    return None


def _between_tags(text: str) -> str | None:
    end = text.rfind(_ANSWER_END)
    start = text.rfind(_ANSWER_START, 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len(_ANSWER_START) : end]


def _boxes(text: str) -> list[tuple[int, tuple[int, int]]]:
    """(start of the command, (first, end) of its content) of each box whose braces close and that contains no box."""
    closing, open_braces = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            closing[open_braces.pop()] = match.start()
    found: list[tuple[int, tuple[int, int]]] = []
    for match in _BOXED.finditer(text):
        if match.end() - 1 not in closing:
            continue
        if found and match.start() < found[-1][1][1]:  # a box in a box
            found.pop()
        found.append((match.start(), (match.end(), closing[match.end() - 1])))
    return found


def _boxed(text: str) -> Stated | None:
    boxes = _boxes(text)
    if not boxes:
        return None
    run = [text[slice(*boxes[-1][1])]]
    everything = list(run)
    adjacent = consistent = True
    for (_, (first, end)), (start, _) in reversed(list(itertools.pairwise(boxes))):
        gap = text[end + 1 : start]
        adjacent = adjacent and len(gap) <= 80 and _BETWEEN_BOXES.fullmatch(gap) is not None
        consistent = consistent and not _CORRECTION.search(gap)
        if not consistent:
            break
        if adjacent:
            run.append(text[first:end])
        everything.append(text[first:end])
    return Stated(", ".join(dict.fromkeys(reversed(run))), tuple(dict.fromkeys(reversed(everything))))


def _after_phrase(text: str) -> Stated | None:
    last = deque(_PHRASE.finditer(text), maxlen=1)
    if not last:
        return None
    line = first_line(text[last[0].end() :].lstrip(" \t\r\n*"))
    option = _OPTION.match(line)
    if option:
        return Stated(f"({option[1]})")
    reason = _REASON.search(line)
    formulas = _formulas(line)
    if formulas and formulas[0][0] <= 30:
        return Stated(", ".join(_side_by_side(line, formulas)))
    claim = (line[: reason.start()] if reason else line).strip(" *")
    return _short(claim) or _loose(claim)


def _short(text: str) -> Stated | None:
    """The whole text if it is an answer and not a sentence: it starts with an answer, or it is a single word."""
    bare = text.strip()
    words = _WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", bare))
    if not bare or (len(words) > 1 and _WORD.match(bare)) or len(words) > 5:
        return None
    if len(words) == 1 and not re.fullmatch(r"[A-Za-z]+", bare) and _WORD.match(bare) and "=" not in bare:
        return None  # "therefore 5"
    return Stated(bare)


def _formulas(text: str) -> list[tuple[int, int, str]]:
    return [
        (match.start(), match.end(), next(group for group in match.groups() if group is not None))
        for match in _MATH.finditer(text)
    ]


def _side_by_side(text: str, formulas: list[tuple[int, int, str]]) -> list[str]:
    """The first formula and those that follow it with only a comma, "and" or "or" between."""
    run = [formulas[0][2]]
    for before, after in itertools.pairwise(formulas):
        if not _are_neighbours(text, before, after):
            break
        run.append(after[2])
    return run


def _are_neighbours(text: str, before: tuple[int, int, str], after: tuple[int, int, str]) -> bool:
    gap = text[before[1] : after[0]]
    return len(gap) <= 40 and _BETWEEN_BOXES.fullmatch(gap) is not None


def _loose(text: str) -> Stated | None:
    """The last formulas side by side, or the last number or option. A single letter is not a formula."""
    formulas = [item for item in _formulas(text) if not re.fullmatch(r"\s*\\?[A-Za-z]+\s*", item[2])]
    after = formulas[-1][1] if formulas else 0
    last = deque(_NUMBER.finditer(text, after), maxlen=1)
    option = deque(_LOOSE_OPTION.finditer(text, last[0].end() if last else after), maxlen=1)
    if option:
        return Stated(f"({next(filter(None, option[0].groups()))})")
    if last:
        return Stated(last[0][0])
    if not formulas:
        return None
    first = len(formulas) - 1
    while first and _are_neighbours(text, formulas[first - 1], formulas[first]):
        first -= 1
    return Stated(", ".join(content for _, _, content in formulas[first:]))
