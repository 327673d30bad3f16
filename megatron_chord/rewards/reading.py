"""Shows how a grader reads a truth, so that the user can check it before a run.

Most texts can be read as mathematics: "seven of them" may become a product of letters. math-verify can loop, so the
grader's functions run in a separate process with a time limit: ``python -m megatron_chord.rewards.reading MARKER``. It
reads one JSON string per line and answers with a JSON pair of kind and text.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chord.rewards.table import RewardConfig, terms_of
from megatron_chord.rewards.tool_calls import read_truth

NUMBER, EXPRESSION, SEVERAL, INTERVALS, OPTION = "number", "expression", "several", "intervals", "option"
WORDS, LETTERS, TEXT, CALLS, FAULT = "words", "letters", "text", "calls", "unreadable"
MEANING = {
    NUMBER: "a number",
    EXPRESSION: "a mathematical expression",
    SEVERAL: "several answers, or one answer with several parts",
    INTERVALS: "intervals",
    OPTION: "an option: its letter and the text after the letter are both right",
    WORDS: "words: only the same words are right",
    LETTERS: "words that are read as a product of letters: only an answer with the same letters is right",
    TEXT: "a text: only an answer that is written in the same way is right",
    CALLS: "calls of functions",
    FAULT: "unreadable: every answer is an error, except one that is written in the same way",
}
DOUBTFUL = frozenset({WORDS, LETTERS, TEXT, FAULT})
TIMEOUT_S = 5.0
"""Time limit for one truth, in seconds."""
_START_S = 120.0
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class TruthReading:
    kind: str
    """A key of ``MEANING``."""
    text: str
    """What was read, in the grader's own notation."""


def truth_reader(reward: RewardConfig, source: str) -> tuple[str, str] | None:
    """(kind, marker) of the first reward that grades the prompts of ``source`` by their truth; None if there is
    none."""
    for term in terms_of(reward).values():
        if term.grades(source) and term.kind in ("math", "exact", "tool_calls"):
            return term.kind, getattr(term, "answer_marker", "####")
    return None


def readings(truths: Iterable[str], kind: str, marker: str) -> Iterator[TruthReading]:
    """How the grader ``kind`` (``reward.kind``) reads each truth, in order."""
    if kind == "math":
        yield from _math_readings(truths, marker)
        return
    read = _read_calls if kind == "tool_calls" else _read_exact
    for truth in truths:
        yield read(truth, marker)


def _read_calls(truth: str, marker: str) -> TruthReading:
    try:
        calls = read_truth(truth)
    except ValueError as error:
        return TruthReading(FAULT, str(error))
    return TruthReading(CALLS, ", ".join(call.name for call in calls) or "no call")


def _read_exact(truth: str, marker: str) -> TruthReading:
    from megatron_chord.rewards.exact import _NUMBER, _normalised

    text = _normalised(truth.rpartition(marker)[2])
    return TruthReading(NUMBER if _NUMBER.fullmatch(text) else TEXT, text)


def _math_readings(truths: Iterable[str], marker: str) -> Iterator[TruthReading]:
    child: _Child | None = None
    try:
        for truth in truths:
            child = child or _Child(marker)
            try:
                yield TruthReading(*child.ask(truth))
            except (OSError, ValueError) as error:
                child.end()
                child = None
                yield TruthReading(FAULT, str(error) or type(error).__name__)
    finally:
        if child is not None:
            child.end()


class _Child:
    def __init__(self, marker: str) -> None:
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_chord.rewards.reading", marker],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._line(_START_S)

    def ask(self, truth: str) -> list[str]:
        """Raises OSError if the child process is late or has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(truth).encode() + b"\n")
        self._process.stdin.flush()
        return self._line(TIMEOUT_S)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise TimeoutError(f"not read within {timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise OSError("the process that reads truths ended")
        return json.loads(line)


def main() -> None:
    (marker,) = sys.argv[1:]
    from megatron_chord.rewards import math

    _answer(_read_math(math, "1", marker))
    for line in sys.stdin:
        _answer(_read_math(math, json.loads(line), marker))


def _answer(reading: TruthReading) -> None:
    print(json.dumps([reading.kind, reading.text[:200]]), flush=True)


def _read_math(math: Any, truth: str, marker: str) -> TruthReading:
    """How the mathematics grader reads a truth. The forms are tried in the same order as in ``rewards.math``."""
    from megatron_chord.rewards import math_forms as forms

    readers: tuple[tuple[str, Callable[[str], Any], Callable[[Any], str]], ...] = (
        (NUMBER, math._plain_number, str),
        (NUMBER, forms.read_based, lambda found: f"{found.digits} in base {found.base}"),
        (OPTION, forms.read_option, lambda found: " ".join(filter(None, found))),
        (EXPRESSION, lambda text: forms.is_empty_set(text) or None, lambda found: "the empty set"),
        (WORDS, forms.read_words, str),
        (EXPRESSION, forms.read_matrix, lambda found: f"a matrix of {len(found)} rows"),
        (
            INTERVALS,
            forms.read_intervals,
            lambda found: " and ".join(f"{one.low} to {one.high}" for one in found),
        ),
        (SEVERAL, forms.read_collection, lambda found: " | ".join(found.items)),
    )
    marked = math.marked_answer(truth, marker) if math._is_marked(truth, marker) else None
    try:
        text = forms.cleaned((truth if marked is None else marked).strip())
        for kind, read, written in readers:
            if (found := read(text)) is not None:
                return TruthReading(kind, written(found))
        quantity = forms.read_quantity(forms.split_label(text)[1])
        value = _read_value(math, quantity.text)
    except Exception as error:  # whatever the library raises for this text
        return TruthReading(FAULT, f"{type(error).__name__}: {error}")
    unit = "%" if quantity.is_percent else quantity.unit
    return TruthReading(value.kind, f"{value.text} {unit}" if unit else value.text)


def _read_value(math: Any, text: str) -> TruthReading:
    import sympy

    if (number := math._plain_number(text)) is not None:
        return TruthReading(NUMBER, str(number))
    parsed = math._parsed(text)
    if not parsed:
        return TruthReading(FAULT, "nothing is read from it")
    first = parsed[0]
    if isinstance(first, sympy.Basic) and first.is_number and not first.has(sympy.E):
        return TruthReading(NUMBER, str(first))
    letters = isinstance(first, sympy.Mul) and _WORD.search(text)
    return TruthReading(LETTERS if letters else EXPRESSION, str(first))


if __name__ == "__main__":
    main()
