"""Mathematically equal answers, judged by math-verify.

The answer is found here, and only LaTeX parsing is asked of math-verify: its other mode hands text to Python's
`eval`. Its own time limits are off, for they rest on signals, which fail in threads; `rewards.pool` kills instead.
"""

from __future__ import annotations

import re
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify

from megatron_chord.rewards.answers import marked_answer

_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_LAST_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def grade(text: str, truth: str, *, marker: str = "####") -> float:
    """1.0 when the answer of `text` equals `truth`, else 0.0. No answer is wrong, and so is an unreadable one.

    The answer is the content of the last complete ``\\boxed{}``; else the line after the last `marker`; else the
    last number. The truth is read the same way, but without box or marker it is taken whole.

    Raises:
        ValueError: the truth cannot be read, which is no fault of the answer.
    """
    answer = marked_answer(text, marker)
    if answer is None:
        numbers = _LAST_NUMBER.findall(text)
        if not numbers:
            return 0.0
        answer = numbers[-1]
    marked_truth = marked_answer(truth, marker)
    return float(_equal(_trimmed(answer), _trimmed(truth if marked_truth is None else marked_truth)))


def _trimmed(answer: str) -> str:
    return answer.strip().removesuffix(".").rstrip()


def _equal(answer: str, truth: str) -> bool:
    if not truth:
        raise ValueError("the truth is empty")
    if answer == truth:
        return True
    given, meant = _plain_number(answer), _plain_number(truth)
    if given is not None and meant is not None:
        if given == meant:
            return True
        if given.denominator == meant.denominator == 1:
            return False
    parsed_truth = _parsed(truth)
    if not parsed_truth:
        raise ValueError(f"the truth cannot be read: {truth[:80]!r}")
    parsed_answer = _parsed(answer)
    return bool(parsed_answer) and verify(parsed_truth, parsed_answer, timeout_seconds=None)


def _plain_number(text: str) -> Fraction | None:
    """A written-out number, exactly; None for anything else, and for what is too long to be meant."""
    if len(text) > 1000 or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def _parsed(text: str) -> list:
    return parse(f"\\boxed{{{text}}}", extraction_config=_LATEX, parsing_timeout=None)  # type: ignore[arg-type]
