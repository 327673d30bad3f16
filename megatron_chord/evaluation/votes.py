"""Finds equal answers of a problem for maj@k. The grader decides whether they are equal, not their spelling."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from megatron_chord.rewards.answers import after_marker, marked_answer
from megatron_chord.rewards.kinds.exact import ExactReward
from megatron_chord.rewards.kinds.math import MathReward
from megatron_chord.rewards.kinds.tool_calls import ToolCallsReward
from megatron_chord.rewards.table import RewardConfig
from megatron_chord.rewards.tool_replies import Call, read_calls

KINDS = ("math", "exact", "tool_calls")
"""Kinds of reward whose answer can be separated from the rest of a response."""


def stated_answer(text: str, reward: RewardConfig) -> str | None:
    """The answer that a response states; None if it states none.

    Raises:
        ValueError: the reward is none of ``KINDS``.
    """
    if isinstance(reward, ToolCallsReward):
        calls = read_calls(text, think=reward.think)
        return None if calls is None else _canonical(calls)
    if isinstance(reward, MathReward):
        found = marked_answer(text, reward.answer_marker)
    elif isinstance(reward, ExactReward):
        found = after_marker(text, reward.answer_marker)
    else:
        raise ValueError(f"a reward of kind {reward.kind} does not say what the answer of a response is")
    return found.strip() if found and found.strip() else None


def _canonical(calls: Sequence[Call]) -> str:
    """A truth that these calls satisfy. It does not depend on the order of the calls and of their arguments."""
    texts = sorted(
        json.dumps({"name": call.name, "arguments": call.arguments}, sort_keys=True) for call in calls
    )
    return f"[{', '.join(texts)}]"


def to_compare(scores: Sequence[float], stated: Sequence[str | None]) -> list[tuple[int, int]]:
    """Pairs of wrong answers with different spellings, which a grader must compare: (answer, taken as truth)."""
    first: dict[str, int] = {}
    for index, (score, text) in enumerate(zip(scores, stated, strict=True)):
        if score < 1 and text is not None:
            first.setdefault(text, index)
    return [(later, earlier) for earlier, later in itertools.combinations(first.values(), 2)]


def votes_of(
    scores: Sequence[float], stated: Sequence[str | None], equal: Iterable[tuple[int, int]]
) -> list[int | None]:
    """The vote of each answer: 0 for right ones, another number for each class of equal wrong ones, None for none.

    Args:
        equal: the pairs of ``to_compare`` whose answers are equal.
    """
    class_of = list(range(len(scores)))
    spelled: dict[str, int] = {}
    for index, text in enumerate(stated):
        if text is not None and scores[index] < 1:
            class_of[index] = spelled.setdefault(text, index)
    for one, other in equal:
        joined, into = class_of[one], class_of[other]
        class_of = [into if number == joined else number for number in class_of]
    return [
        0 if score >= 1 else None if text is None else class_of[index] + 1
        for index, (score, text) in enumerate(zip(scores, stated, strict=True))
    ]
