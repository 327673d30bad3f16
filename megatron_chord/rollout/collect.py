"""Prompts -> sampled and graded rollouts. Runs on the coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Prompt, Rollout
from megatron_chord.rewards.pool import Grade, GraderPool
from megatron_chord.rollout.client import RolloutClient, SampleRequest


class TooManyGraderErrors(RuntimeError):
    """More gradings of a step failed than the run allows: rewards would be about the grader, not the policy."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample: the same for every prompt of a call."""

    num_samples: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt to be answered."""

    prompt: Prompt
    seed: int
    prefix: tuple[int, ...] = ()
    """The answer's beginning, given and not sampled; counts towards the answer's length limit."""


@dataclass(frozen=True, kw_only=True)
class GradedRollouts:
    """One prompt's rollouts with their grades and rewards, in the engine's order."""

    prompt: Prompt
    prefix: tuple[int, ...] = ()
    """What every answer begins with; not part of ``rollouts``."""
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    """The whole answers, prefix included."""
    grades: tuple[Grade, ...]
    rewards: tuple[float | None, ...]
    """The grade's score with format and length taken into account; None where the grading failed."""


Shaping = Callable[[float, str, Rollout, int], float]
"""(score, whole answer, what was sampled of it, tokens of the whole answer) -> reward"""


def sample_seed(run_seed: int, name: str, position: int) -> int:
    """Seed of the request for a data set's ``position``-th draw: a pure function, so a resumed run samples the same."""
    digest = hashlib.blake2b(f"{run_seed}/{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def sample(
    clients: Sequence[RolloutClient],
    asks: Sequence[Ask],
    sampling: Sampling,
    *,
    version: int,
    deadline_s: float,
    may_advance: bool = False,
    on_done: Callable[[int], None] | None = None,
) -> list[tuple[Rollout, ...]]:
    """Rollouts of every ask, all of weight version ``version``; requests are dealt out to the servers in turn.

    With ``may_advance`` weights may be pushed meanwhile, and later versions are right, too.

    Raises RolloutError when any request fails for good: a step never goes on with half a batch.
    """
    requests = [
        SampleRequest(
            prompt_ids=ask.prompt.token_ids + ask.prefix,
            num_samples=sampling.num_samples,
            seed=ask.seed,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens - len(ask.prefix),
            stop_token_ids=sampling.stop_token_ids,
        )
        for ask in asks
    ]
    done = [0] * len(clients)

    def serve(server: int) -> list[tuple[Rollout, ...]]:
        def count(finished: int) -> None:
            done[server] = finished
            if on_done is not None:
                on_done(sum(done))

        share = requests[server :: len(clients)]
        return clients[server].generate(
            share, version=version, deadline_s=deadline_s, may_advance=may_advance, on_done=count
        )

    pool = ThreadPoolExecutor(len(clients))
    try:
        shares = list(pool.map(serve, range(len(clients))))
    finally:
        # Not waiting: on a signal the server is stopped next, which ends the requests.
        pool.shutdown(wait=False, cancel_futures=True)
    return [shares[index % len(clients)][index // len(clients)] for index in range(len(requests))]


def grade(
    asks: Sequence[Ask],
    sampled: Sequence[tuple[Rollout, ...]],
    *,
    template: ChatTemplate,
    graders: GraderPool,
    max_error_rate: float,
    shaping: Shaping = lambda score, text, rollout, length: score,
) -> list[GradedRollouts]:
    """Decode and grade every rollout.

    Raises:
        TooManyGraderErrors: more than ``max_error_rate`` of the gradings failed.
    """
    texts = _texts(asks, sampled, template)
    items = [(text, ask.prompt.truth) for ask, group in zip(asks, texts, strict=True) for text in group]
    grades = graders.grade_all(items)
    errors = [grade.error for grade in grades if grade.error is not None]
    if len(errors) > max_error_rate * len(grades):
        raise TooManyGraderErrors(
            f"{len(errors)} of {len(grades)} gradings failed (reward.max_error_rate {max_error_rate}); "
            f"the first: {errors[0]}"
        )
    return _assembled(asks, sampled, texts, grades, shaping)


def graded_before(
    asks: Sequence[Ask],
    sampled: Sequence[tuple[Rollout, ...]],
    grades: Sequence[Grade],
    *,
    template: ChatTemplate,
    shaping: Shaping,
) -> list[GradedRollouts]:
    """As ``grade``, with the grades at hand: one for each rollout of every ask, in order."""
    return _assembled(asks, sampled, _texts(asks, sampled, template), grades, shaping)


def _texts(
    asks: Sequence[Ask], sampled: Sequence[tuple[Rollout, ...]], template: ChatTemplate
) -> list[tuple[str, ...]]:
    return [
        tuple(template.decode(ask.prefix + rollout.token_ids) for rollout in rollouts)
        for ask, rollouts in zip(asks, sampled, strict=True)
    ]


def _assembled(
    asks: Sequence[Ask],
    sampled: Sequence[tuple[Rollout, ...]],
    texts: Sequence[tuple[str, ...]],
    grades: Sequence[Grade],
    shaping: Shaping,
) -> list[GradedRollouts]:
    graded, start = [], 0
    for ask, rollouts, group in zip(asks, sampled, texts, strict=True):
        here = tuple(grades[start : start + len(rollouts)])
        lengths = [len(ask.prefix) + len(rollout.token_ids) for rollout in rollouts]
        rewards = tuple(
            None if grade.score is None else shaping(grade.score, text, rollout, length)
            for grade, text, rollout, length in zip(here, group, rollouts, lengths, strict=True)
        )
        graded.append(
            GradedRollouts(
                prompt=ask.prompt,
                prefix=ask.prefix,
                rollouts=rollouts,
                texts=group,
                grades=here,
                rewards=rewards,
            )
        )
        start += len(rollouts)
    return graded
