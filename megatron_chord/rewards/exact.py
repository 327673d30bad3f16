"""Equal text after the answer marker."""

from __future__ import annotations

import re

from megatron_chord.rewards.answers import after_marker, first_line

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def grade(text: str, truth: str, *, marker: str = "####") -> float:
    """1.0 if the text after the last `marker`, up to the end of the line, equals `truth`; else 0.0.

    Numbers are compared as they are written, but commas, dollar signs and a final period are ignored: 1,000 equals
    $1000, but 18.0 does not equal 18. A truth with a marker is read in the same way. Without a marker the answer is
    wrong.
    """
    answer = after_marker(text, marker)
    if answer is None:
        return 0.0
    return float(_normalised(answer) == _normalised(truth.rpartition(marker)[2]))


def _normalised(answer: str) -> str:
    line = first_line(answer).strip().removesuffix(".").rstrip()
    bare = line.replace(",", "").replace("$", "").strip()
    return bare if _NUMBER.fullmatch(bare) else line
