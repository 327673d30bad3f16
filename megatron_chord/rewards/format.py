"""Rewards that look at the form of a response beside its answer.

For training only: accuracy, dynamic sampling and evaluation go by the grader's own score.
"""

from __future__ import annotations

from typing import Literal

FormatRule = Literal["none", "chord", "trinity"]

MALFORMED = -0.1
NO_ANSWER = -1.0


def well_formed(text: str) -> bool:
    """Exactly one ``<think>`` and one ``</think>``, in this order (Trinity-RFT, eval_utils.py)."""
    return text.count("<think>") == text.count("</think>") == 1 and text.index("<think>") < text.index(
        "</think>"
    )


def shape_reward(score: float, *, text: str, truncated: bool, answered: bool, rule: FormatRule) -> float:
    """The reward for a response of which the grader says `score`: 1 for right, 0 for wrong.

    ``chord`` (arXiv 2508.11408, A.2): -1 where the length limit was hit before a final answer; else 1 for a right
    answer, 0 for a wrong one that is well-formed and -0.1 for one that is not. ``trinity`` (Trinity-RFT,
    math_reward.py): `score`, and -0.1 for what is not well-formed, be it right or wrong. ``none``: `score`.

    Args:
        truncated: the response ended at the length limit.
        answered: the reward's `has_answer` of it. Without, a number that the grader found in passing is no answer.
    """
    if rule == "none":
        return score
    penalty = 0.0 if well_formed(text) else MALFORMED
    if rule == "trinity":
        return score + penalty
    if truncated and not answered:
        return NO_ANSWER
    return score or penalty
