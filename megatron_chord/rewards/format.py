"""Rewards that depend on the format of a response as well as on its answer.

They are for training only: accuracy, dynamic sampling and evaluation use the grader's score.
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
    """The reward of a response to which the grader gives `score`: 1 for right, 0 for wrong.

    ``chord`` (arXiv 2508.11408, A.2): -1 if the length limit was reached before a final answer; else 1 for a right
    answer, 0 for a wrong one that is well-formed and -0.1 for a wrong one that is not. ``trinity`` (Trinity-RFT,
    math_reward.py): `score`, minus 0.1 if the response is not well-formed, whether right or wrong. ``none``: `score`.

    Args:
        truncated: the response ended at the length limit.
        answered: the result of the reward's `has_answer`. If False, a number that the grader found is not an answer.
    """
    if rule == "none":
        return score
    penalty = 0.0 if well_formed(text) else MALFORMED
    if rule == "trinity":
        return score + penalty
    if truncated and not answered:
        return NO_ANSWER
    return score or penalty
