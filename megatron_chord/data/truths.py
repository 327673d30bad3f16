"""Finds doubtful truths of a data set: several truths for one problem, and truths that are only text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from megatron_chord.records import Prompt

_SHOWN = 60
"""Characters of a truth."""


def doubts(prompts: Sequence[Prompt], is_text: Callable[[Prompt], bool] = lambda prompt: False) -> list[str]:
    """A line for each kind of doubt, with the number of cases and the first example; empty if there is none.

    Args:
        is_text: whether the grader can compare the prompt's truth only as text.
    """
    lines = []
    pairs = conflicting(prompts)
    if pairs:
        first, other = pairs[0]
        problems = "1 problem has" if len(pairs) == 1 else f"{len(pairs)} problems have"
        lines.append(f"{problems} several truths, e.g. {_example_text(first)} and {_example_text(other)}")
    texts = [prompt for prompt in prompts if is_text(prompt)]
    if texts:
        truths = (
            "1 of 1 truth is read" if len(prompts) == 1 else f"{len(texts)} of {len(prompts)} truths are read"
        )
        lines.append(
            f"{truths} as text, e.g. {_example_text(texts[0])}: a right answer in other words gets reward 0"
        )
    return lines


def conflicting(prompts: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """For every problem with several truths: the first prompt, and the first prompt with another truth.

    Problems are the same when their prompts have the same tokens. 15, 15.0 and 1,000 are compared as numbers.
    """
    first: dict[tuple[int, ...], Prompt] = {}
    other: dict[tuple[int, ...], Prompt] = {}
    for prompt in prompts:
        known = first.setdefault(prompt.token_ids, prompt)
        if _value(known.truth) != _value(prompt.truth):
            other.setdefault(prompt.token_ids, prompt)
    return [(first[ids], prompt) for ids, prompt in other.items()]


def _value(truth: str) -> str | Fraction:
    text = truth.strip()
    try:
        return Fraction(text.replace(",", "")) if len(text) < 100 else text
    except (ValueError, ZeroDivisionError):
        return text


def _example_text(prompt: Prompt) -> str:
    truth = prompt.truth if len(prompt.truth) <= _SHOWN else f"{prompt.truth[:_SHOWN]}..."
    return f"{prompt.id} {truth!r}"
