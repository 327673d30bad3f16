"""Prompts -> sampled and graded rollouts. Runs on the coordinator."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Prompt, Rollout, Span
from megatron_chord.rewards.graders import Graders
from megatron_chord.rewards.pool import Grade
from megatron_chord.rewards.response import Response
from megatron_chord.rollout.client import GenerateRequest, RolloutClient, Stop


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
class RolloutRequest:
    """One prompt to be answered."""

    prompt: Prompt
    seed: int
    prefix: tuple[int, ...] = ()
    """The answer's beginning, given and not sampled; counts towards the answer's length limit."""
    partial_rollouts: tuple[Rollout, ...] = ()
    """What was sampled of each answer before; those with the finish reason `abort` are to be continued."""
    is_awaited: bool = False
    """Sampling does not stop before it is answered."""

    @property
    def is_answered(self) -> bool:
        return bool(self.partial_rollouts) and all(
            rollout.finish_reason != "abort" for rollout in self.partial_rollouts
        )


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
    """The weighted sum of the reward's terms, with format and length; None where the grading failed."""


Shaping = Callable[[Grade, str, Rollout, int], float]
"""(grade with a score, whole answer, what was sampled of it, tokens of the whole answer) -> reward"""


def sample_seed(run_seed: int, name: str, position: int) -> int:
    """Seed of the request for a data set's ``position``-th draw: a pure function, so a resumed run samples the same."""
    digest = hashlib.blake2b(f"{run_seed}/{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def sample(
    clients: Sequence[RolloutClient],
    asks: Sequence[RolloutRequest],
    sampling: Sampling,
    *,
    version: int,
    deadline_s: float,
    may_advance: bool = False,
    on_done: Callable[[int], None] | None = None,
    enough: int | None = None,
) -> list[tuple[Rollout, ...]]:
    """Rollouts of every ask, in order, of weight version ``version``; requests are dealt out to the servers in turn.

    What was begun before keeps the versions that sampled it. With ``may_advance`` weights may be pushed meanwhile, and
    later versions are right, too. With ``enough``, sampling stops when so many asks are answered, those that are
    awaited among them; of the others comes back what there is, unfinished rollouts with the finish reason `abort`, or
    nothing where nothing was sampled.

    ``on_done`` is called with the number of asks that are answered, each time another is.

    Raises RolloutError when any request fails for good: a step never goes on with half a batch.
    """
    answered = [ask.is_answered for ask in asks]

    def are_enough() -> bool:
        awaited = (done for ask, done in zip(asks, answered, strict=True) if ask.is_awaited)
        return enough is not None and sum(answered) >= enough and all(awaited)

    if are_enough():
        return [ask.partial_rollouts for ask in asks]
    pieces = [piece for index, ask in enumerate(asks) for piece in _pieces(index, ask, sampling)]
    missing = Counter(piece.ask for piece in pieces)
    lock, stop = threading.Lock(), Stop()

    def count(piece: _RequestPart) -> None:
        with lock:
            missing[piece.ask] -= 1
            answered[piece.ask] = missing[piece.ask] == 0
            has_another, num_answered, may_stop = answered[piece.ask], sum(answered), are_enough()
        if has_another and on_done is not None:
            on_done(num_answered)
        if may_stop:
            stop()

    def serve(server: int) -> list[tuple[Rollout, ...]]:
        share = pieces[server :: len(clients)]
        return clients[server].generate(
            [piece.request for piece in share],
            version=version,
            deadline_s=deadline_s,
            may_advance=may_advance,
            on_done=lambda index: count(share[index]),
            stop=stop if enough is not None else None,
        )

    pool = ThreadPoolExecutor(len(clients))
    try:
        shares = list(pool.map(serve, range(len(clients))))
    finally:
        # Not waiting: on a signal the server is stopped next, which ends the requests.
        pool.shutdown(wait=False, cancel_futures=True)
    found = [list(ask.partial_rollouts) for ask in asks]
    for index, piece in enumerate(pieces):
        rollouts = shares[index % len(clients)][index // len(clients)]
        if piece.sample is None:
            found[piece.ask] = list(rollouts)
        else:
            found[piece.ask][piece.sample] = _joined(
                asks[piece.ask].partial_rollouts[piece.sample], rollouts[0]
            )
    return [tuple(group) if any(rollout.token_ids for rollout in group) else () for group in found]


@dataclass(frozen=True, kw_only=True)
class _RequestPart:
    """One request of an ask."""

    ask: int
    sample: int | None
    """Which of its samples is continued; all of them are sampled from their beginning where None."""
    request: GenerateRequest


def _pieces(index: int, ask: RolloutRequest, sampling: Sampling) -> list[_RequestPart]:
    def request(partial_rollouts: tuple[int, ...], num_samples: int, seed: int) -> GenerateRequest:
        return GenerateRequest(
            prompt_ids=ask.prompt.token_ids + ask.prefix + partial_rollouts,
            num_samples=num_samples,
            seed=seed,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens - len(ask.prefix) - len(partial_rollouts),
            stop_token_ids=sampling.stop_token_ids,
        )

    if not ask.partial_rollouts:
        return [_RequestPart(ask=index, sample=None, request=request((), sampling.num_samples, ask.seed))]
    return [
        _RequestPart(
            ask=index,
            sample=sample,
            request=request(
                rollout.token_ids, 1, sample_seed(ask.seed, f"from {len(rollout.token_ids)}", sample)
            ),
        )
        for sample, rollout in enumerate(ask.partial_rollouts)
        if rollout.finish_reason == "abort"
    ]


def _joined(partial_rollouts: Rollout, rest: Rollout) -> Rollout:
    """One rollout of what was sampled of it at two times."""
    if not partial_rollouts.token_ids or not rest.token_ids:
        kept = partial_rollouts if partial_rollouts.token_ids else rest
        return replace(kept, finish_reason=rest.finish_reason)
    spans: list[Span] = []
    for version, group in itertools.groupby(
        partial_rollouts.all_spans + rest.all_spans, key=lambda span: span[0]
    ):
        spans.append((version, sum(count for _, count in group)))
    return Rollout(
        token_ids=partial_rollouts.token_ids + rest.token_ids,
        logprobs=partial_rollouts.logprobs + rest.logprobs,
        finish_reason=rest.finish_reason,
        weight_version=min(partial_rollouts.weight_version, rest.weight_version),
        spans=tuple(spans) if len(spans) > 1 else (),
    )


def grade(
    asks: Sequence[RolloutRequest],
    sampled: Sequence[tuple[Rollout, ...]],
    *,
    template: ChatTemplate,
    graders: Graders,
    max_error_rate: float,
    shaping: Shaping | None = None,
) -> list[GradedRollouts]:
    """Decode and grade every rollout: the assistant's whole turn (``ChatTemplate.turn``).

    Without ``shaping`` the rewards are the scores.

    Raises:
        TooManyGraderErrors: more than ``max_error_rate`` of the gradings failed.
    """
    texts = _texts(asks, sampled, template)
    responses = [
        response_to(ask, rollout, text)
        for ask, rollouts, group in zip(asks, sampled, texts, strict=True)
        for rollout, text in zip(rollouts, group, strict=True)
    ]
    grades = graders.grade_all(responses)
    errors = [grade.error for grade in grades if grade.error is not None]
    if len(errors) > max_error_rate * len(grades):
        raise TooManyGraderErrors(
            f"{len(errors)} of {len(grades)} gradings failed (reward.max_error_rate {max_error_rate}); "
            f"the first: {errors[0]}"
        )
    return _assembled(asks, sampled, texts, grades, shaping)


def graded_before(
    asks: Sequence[RolloutRequest],
    sampled: Sequence[tuple[Rollout, ...]],
    grades: Sequence[Grade],
    *,
    template: ChatTemplate,
    shaping: Shaping,
) -> list[GradedRollouts]:
    """As ``grade``, with the grades at hand: one for each rollout of every ask, in order."""
    return _assembled(asks, sampled, _texts(asks, sampled, template), grades, shaping)


def response_to(ask: RolloutRequest, rollout: Rollout, text: str) -> Response:
    """What a grader is given of an answer. ``text`` and ``num_tokens`` are of the whole one, its prefix included."""
    prompt = ask.prompt
    return Response(
        text=text,
        truth=prompt.truth,
        messages=prompt.messages,
        fields=prompt.fields,
        finish_reason=rollout.finish_reason,
        num_tokens=len(ask.prefix) + len(rollout.token_ids),
        source=prompt.source,
    )


def _texts(
    asks: Sequence[RolloutRequest], sampled: Sequence[tuple[Rollout, ...]], template: ChatTemplate
) -> list[tuple[str, ...]]:
    return [
        tuple(template.turn(ask.prompt.token_ids, ask.prefix + rollout.token_ids) for rollout in rollouts)
        for ask, rollouts in zip(asks, sampled, strict=True)
    ]


def _assembled(
    asks: Sequence[RolloutRequest],
    sampled: Sequence[tuple[Rollout, ...]],
    texts: Sequence[tuple[str, ...]],
    grades: Sequence[Grade],
    shaping: Shaping | None,
) -> list[GradedRollouts]:
    graded, start = [], 0
    for ask, rollouts, group in zip(asks, sampled, texts, strict=True):
        here = tuple(grades[start : start + len(rollouts)])
        lengths = [len(ask.prefix) + len(rollout.token_ids) for rollout in rollouts]
        rewards = tuple(
            grade.score if grade.score is None or shaping is None else shaping(grade, text, rollout, length)
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


def part_means(graded: Sequence[GradedRollouts]) -> dict[str, dict[str, float]]:
    """``reward_terms``: the mean of every term and named part, over the rollouts that have it; unweighted.

    Nothing where no grade has parts: the reward is a single number then.
    """
    values: dict[str, list[float]] = {}
    for grade in (grade for item in graded for grade in item.grades):
        for name, value in grade.parts.items():
            values.setdefault(name, []).append(value)
    means = {name: statistics.fmean(found) for name, found in sorted(values.items())}
    return {"reward_terms": means} if means else {}
