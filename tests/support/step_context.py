"""A ``StepContext`` of prompts, demonstrations and clients that a test gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.cursor import Cursor, fingerprint
from megatron_chord.records import Demonstration, Prompt
from megatron_chord.sampling.context import SamplingServices, Sources, StepContext
from megatron_chord.schedules import ScheduleInput
from megatron_chord.timing import Timer


def step_context(
    run: RunConfig,
    services: SamplingServices,
    prompts: Sequence[Prompt],
    *,
    demonstration_of: Mapping[str, Demonstration] | None = None,
    recorded: Sequence[Mapping[str, Any]] | None = None,
) -> StepContext:
    """The context of step 0.

    Args:
        demonstration_of: the demonstration of each prompt, by the prompt's id.
        recorded: the step's sampling rounds from a checkpoint.
    """
    return StepContext(
        run,
        services,
        sources_at_start(prompts, demonstration_of),
        now=ScheduleInput(step=0),
        memory=None,
        timer=Timer(),
        notify=lambda text: None,
        recorded=recorded,
    )


def sources_at_start(
    prompts: Sequence[Prompt], demonstration_of: Mapping[str, Demonstration] | None = None
) -> Sources:
    """The data of a run at its start. It draws no demonstrations but those of its prompts."""
    given = demonstration_of or {}
    return Sources(
        prompts=prompts,
        demonstrations=list(given.values()),
        demonstration_of=given,
        prompt_cursor=Cursor(name="prompts", size=len(prompts), seed=0, data=fingerprint(prompts)),
        demonstration_cursor=None,
    )
