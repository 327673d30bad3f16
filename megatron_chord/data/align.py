"""Match prompts and demonstrations: a demonstration belongs to a prompt if it begins with the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_chord.data.rows import DataError
from megatron_chord.records import Demonstration, Prompt

_SHOWN = 5


def align(
    prompts: Sequence[Prompt], demonstrations: Sequence[Demonstration], *, unmatched: Literal["fail", "drop"]
) -> tuple[list[Prompt], dict[str, Demonstration]]:
    """The prompts that have a demonstration with a single answer, and the first such demonstration of each, by prompt
    id.

    Raises:
        DataError: a prompt has no demonstration and ``unmatched`` is "fail", or no prompt has one.
    """
    answers: dict[tuple[int, ...], Demonstration] = {}
    for demonstration in demonstrations:
        start = demonstration.trainable.index(True)
        stop = len(demonstration.trainable) - demonstration.trainable[::-1].index(True)
        if all(demonstration.trainable[start:stop]):
            answers.setdefault(demonstration.token_ids[:start], demonstration)
    matched = [prompt for prompt in prompts if prompt.token_ids in answers]
    missing = [prompt.id for prompt in prompts if prompt.token_ids not in answers]
    if missing and (unmatched == "fail" or not matched):
        some = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise DataError(
            f"data.aligned: {len(missing)} of {len(prompts)} prompts have no demonstration of the same problem in "
            f"data.demonstrations ({some}); data.unmatched: drop leaves them out"
        )
    return matched, {prompt.id: answers[prompt.token_ids] for prompt in matched}
