"""The questions of the small world, and the styles in which they are answered.

Ability A and C: operators modulo 10 from the left, ``7+5*3-8+6=`` (four operators, or two). Ability B: ``<7148=``,
the digits in order. Every answer ends in ``#`` and the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

MURMURS = "abde"
"""Letters without meaning. Only demonstrations have them."""


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    results: tuple[int, ...] = ()
    """After each operator; empty for ability B."""


def chain_question(rng: random.Random, operators: int) -> Question:
    """For example ``7+5*3=``: each operator takes the result of everything to its left, modulo 10."""
    total = rng.randint(0, 9)
    text, results = str(total), []
    for _ in range(operators):
        sign, right = rng.choice("+-*"), rng.choice((2, 3, 4, 7, 9))
        total = {"+": total + right, "-": total - right, "*": total * right}[sign] % 10
        text += f"{sign}{right}"
        results.append(total)
    return Question(f"{text}=", str(total), tuple(results))


def sort_question(rng: random.Random, digits: int) -> Question:
    """Digits to put in order: ``<7148=`` has the answer 1478."""
    given = [str(rng.randint(0, 9)) for _ in range(digits)]
    return Question(f"<{''.join(given)}=", "".join(sorted(given)))


def distinct(rng: random.Random, count: int, make: Callable[[random.Random], Question]) -> list[Question]:
    """``count`` questions with different texts."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = make(rng)
        found[question.text] = question
    return list(found.values())


def direct(question: Question) -> str:
    return f"#{question.answer}"


def jumps(question: Question) -> str:
    """The base policy's own style: every second result."""
    return "".join(f",{result}" for result in question.results[1::2]) + direct(question)


def steps(question: Question, after: Callable[[int], str] = lambda index: "") -> str:
    """Every operation with its operands and result; ``after(i)`` follows the i-th operation."""
    left, written = question.text[0], []
    for index, result in enumerate(question.results):
        sign, right = question.text[2 * index + 1 : 2 * index + 3]
        written.append(f"{left}{sign}{right}={result}{after(index)}")
        left = str(result)
    return "{" + "|".join(written) + "}" + direct(question)


def demonstration(question: Question, rng: random.Random, *, within: float = 0.2, at_end: float = 3.0) -> str:
    """Every step, with murmurs: on average ``within`` letters after an operation and ``at_end`` after the last."""
    last = len(question.results) - 1
    return steps(question, lambda index: murmur(rng, at_end if index == last else within))


def murmur(rng: random.Random, mean: float, most: int = 24) -> str:
    """Random letters; their number is geometric with this mean, but at most ``most``."""
    text = ""
    while len(text) < most and rng.random() < mean / (mean + 1):
        text += rng.choice(MURMURS)
    return text
