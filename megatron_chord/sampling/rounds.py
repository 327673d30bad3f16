"""One sampling round: prompts -> sampled and graded rollouts. Runs on the coordinator."""

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
from megatron_chord.rollout.client import RolloutClient, Stop
from megatron_chord.rollout.replies import GenerateRequest
from megatron_chord.routes import Routes, RouteShape, joined


class TooManyGraderErrors(RuntimeError):
    """More gradings of a step failed than the run allows. Rewards would depend on the grader and not on the policy."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling settings of one call. They are the same for all of its prompts."""

    num_samples: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    routes: RouteShape | None = None
    """The shape of the rollouts' routes; None: rollouts have no routes."""
    step: int | None = None
    """The step for which servers keep the routes if they can (``rollout.route_store``). None: the replies contain the
    routes."""


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One prompt to sample rollouts of."""

    prompt: Prompt
    seed: int
    prefix: tuple[int, ...] = ()
    """Token ids with which every answer begins. They are not sampled, but count towards the length limit."""
    partial_rollouts: tuple[Rollout, ...] = ()
    """Rollouts of this prompt that were sampled earlier. Those with the finish reason `abort` are continued."""
    is_awaited: bool = False
    """True if sampling must not stop before this request is complete."""

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
    """Token ids with which every answer begins. They are not part of ``rollouts``."""
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    """The whole answers, including the prefix."""
    grades: tuple[Grade, ...]
    rewards: tuple[float | None, ...]
    """The weighted sum of the reward's terms, changed by the rules for form and length. None if the grading failed."""


Shaping = Callable[[Grade, str, Rollout, int], float]
"""(grade with a score, text of the whole answer, its sampled rollout, tokens of the whole answer) -> reward"""


def sample_seed(run_seed: int, name: str, position: int) -> int:
    """The seed of the request for a data set's ``position``-th draw.

    It is a pure function, so a resumed run samples the same tokens.
    """
    digest = hashlib.blake2b(f"{run_seed}/{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def sample(
    clients: Sequence[RolloutClient],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    *,
    version: int,
    deadline_s: float,
    may_advance: bool = False,
    on_done: Callable[[int], None] | None = None,
    stop_after: int | None = None,
) -> list[tuple[Rollout, ...]]:
    """Sample the rollouts of every request, in the order of the requests. They are spread round-robin over the servers.

    Args:
        version: the weight version that must have sampled every new token. Tokens sampled earlier (partial rollouts)
            keep their version.
        may_advance: whether weights may be pushed during the call. If so, later versions are accepted, too.
        on_done: called with the number of complete requests, each time that one more is complete.
        stop_after: if given, sampling stops as soon as this number of requests is complete, including all with
            ``is_awaited``. The other requests return their unfinished rollouts, with the finish reason `abort`, or an
            empty tuple if nothing was sampled.

    Raises:
        RolloutError: a request failed, also after retries. A step never continues with a part of its batch.
    """
    answered = [request.is_answered for request in requests]

    def may_stop() -> bool:
        awaited = (done for request, done in zip(requests, answered, strict=True) if request.is_awaited)
        return stop_after is not None and sum(answered) >= stop_after and all(awaited)

    if may_stop():
        return [request.partial_rollouts for request in requests]
    parts = [part for index, request in enumerate(requests) for part in _parts_of(index, request, sampling)]
    missing = Counter(part.index for part in parts)
    lock, stop = threading.Lock(), Stop()

    def count(part: _RequestPart) -> None:
        with lock:
            missing[part.index] -= 1
            answered[part.index] = missing[part.index] == 0
            has_another, num_answered, ends = answered[part.index], sum(answered), may_stop()
        if has_another and on_done is not None:
            on_done(num_answered)
        if ends:
            stop()

    def serve(server: int) -> list[tuple[Rollout, ...]]:
        share = parts[server :: len(clients)]
        return clients[server].generate(
            [part.http_request for part in share],
            version=version,
            deadline_s=deadline_s,
            may_advance=may_advance,
            on_done=lambda index: count(share[index]),
            stop=stop if stop_after is not None else None,
        )

    pool = ThreadPoolExecutor(len(clients))
    try:
        shares = list(pool.map(serve, range(len(clients))))
    finally:
        # Do not wait for the threads: after a signal the server is stopped next, which ends their requests.
        pool.shutdown(wait=False, cancel_futures=True)
    found = [list(request.partial_rollouts) for request in requests]
    for index, part in enumerate(parts):
        rollouts = shares[index % len(clients)][index // len(clients)]
        if part.sample is None:
            found[part.index] = list(rollouts)
        else:
            found[part.index][part.sample] = _joined(
                requests[part.index].partial_rollouts[part.sample],
                rollouts[0],
                has_all_routes=part.http_request.first_routed == 0,
            )
    return [tuple(group) if any(rollout.token_ids for rollout in group) else () for group in found]


@dataclass(frozen=True, kw_only=True)
class _RequestPart:
    """One HTTP request; a ``RolloutRequest`` has one or more of them."""

    index: int
    sample: int | None
    """Index of the rollout that is continued. None if all rollouts of the request are sampled from the beginning."""
    http_request: GenerateRequest


def _parts_of(index: int, request: RolloutRequest, sampling: Sampling) -> list[_RequestPart]:
    def http_request(
        partial_rollouts: tuple[int, ...], num_samples: int, seed: int, num_routed: int = 0
    ) -> GenerateRequest:
        return GenerateRequest(
            prompt_ids=request.prompt.token_ids + request.prefix + partial_rollouts,
            num_samples=num_samples,
            seed=seed,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens - len(request.prefix) - len(partial_rollouts),
            stop_token_ids=sampling.stop_token_ids,
            routes=sampling.routes,
            keep_routes_for=sampling.step,
            first_routed=num_routed,
        )

    if not request.partial_rollouts:
        return [
            _RequestPart(
                index=index, sample=None, http_request=http_request((), sampling.num_samples, request.seed)
            )
        ]
    return [
        _RequestPart(
            index=index,
            sample=sample,
            http_request=http_request(
                rollout.token_ids,
                1,
                sample_seed(request.seed, f"from {len(rollout.token_ids)}", sample),
                len(rollout.routes) if sampling.routes is not None and rollout.routes is not None else 0,
            ),
        )
        for sample, rollout in enumerate(request.partial_rollouts)
        if rollout.finish_reason == "abort"
    ]


def _joined(partial_rollouts: Rollout, rest: Rollout, *, has_all_routes: bool) -> Rollout:
    """Concatenate a partial rollout and its continuation.

    ``has_all_routes``: whether the continuation has the routes of all tokens, and not only those that the partial
    rollout lacks.
    """
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
        routes=rest.routes if has_all_routes else _joined_routes(partial_rollouts.routes, rest.routes),
    )


def _joined_routes(first: Routes | None, second: Routes | None) -> Routes | None:
    """Concatenate routes without a gap. The routes of the first tokens are those of the weights that sampled these
    tokens."""
    return None if first is None or second is None else joined([first, second])


def grade(
    requests: Sequence[RolloutRequest],
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
    texts = _texts(requests, sampled, template)
    responses = [
        response_to(request, rollout, text)
        for request, rollouts, group in zip(requests, sampled, texts, strict=True)
        for rollout, text in zip(rollouts, group, strict=True)
    ]
    grades = graders.grade_all(responses)
    errors = [grade.error for grade in grades if grade.error is not None]
    if len(errors) > max_error_rate * len(grades):
        raise TooManyGraderErrors(
            f"{len(errors)} of {len(grades)} gradings failed (reward.max_error_rate {max_error_rate}); "
            f"the first error: {errors[0]}"
        )
    return _assembled(requests, sampled, texts, grades, shaping)


def graded_before(
    requests: Sequence[RolloutRequest],
    sampled: Sequence[tuple[Rollout, ...]],
    grades: Sequence[Grade],
    *,
    template: ChatTemplate,
    shaping: Shaping,
) -> list[GradedRollouts]:
    """Like ``grade``, but with existing grades: one for each rollout of every request, in order."""
    return _assembled(requests, sampled, _texts(requests, sampled, template), grades, shaping)


def response_to(request: RolloutRequest, rollout: Rollout, text: str) -> Response:
    """The argument of the grader for an answer. ``text`` and ``num_tokens`` are those of the whole answer with its
    prefix."""
    length = len(request.prefix) + len(rollout.token_ids)
    return response_of(request.prompt, text, rollout.finish_reason, length)


def response_of(prompt: Prompt, text: str, finish_reason: str, num_tokens: int) -> Response:
    """The argument of the grader for an answer to ``prompt``."""
    return Response(
        text=text,
        truth=prompt.truth,
        messages=prompt.messages,
        fields=prompt.fields,
        finish_reason=finish_reason,
        num_tokens=num_tokens,
        source=prompt.source,
    )


def _texts(
    requests: Sequence[RolloutRequest], sampled: Sequence[tuple[Rollout, ...]], template: ChatTemplate
) -> list[tuple[str, ...]]:
    return [
        tuple(
            template.turn(request.prompt.token_ids, request.prefix + rollout.token_ids)
            for rollout in rollouts
        )
        for request, rollouts in zip(requests, sampled, strict=True)
    ]


def _assembled(
    requests: Sequence[RolloutRequest],
    sampled: Sequence[tuple[Rollout, ...]],
    texts: Sequence[tuple[str, ...]],
    grades: Sequence[Grade],
    shaping: Shaping | None,
) -> list[GradedRollouts]:
    graded, start = [], 0
    for request, rollouts, group in zip(requests, sampled, texts, strict=True):
        here = tuple(grades[start : start + len(rollouts)])
        lengths = [len(request.prefix) + len(rollout.token_ids) for rollout in rollouts]
        rewards = tuple(
            grade.score if grade.score is None or shaping is None else shaping(grade, text, rollout, length)
            for grade, text, rollout, length in zip(here, group, rollouts, lengths, strict=True)
        )
        graded.append(
            GradedRollouts(
                prompt=request.prompt,
                prefix=request.prefix,
                rollouts=rollouts,
                texts=group,
                grades=here,
                rewards=rewards,
            )
        )
        start += len(rollouts)
    return graded


def part_means(graded: Sequence[GradedRollouts]) -> dict[str, dict[str, float]]:
    """The metric ``reward_terms``: the unweighted mean of every term and named part, over the rollouts that have it.

    It is empty if no grade has parts, because the reward is then a single number.
    """
    values: dict[str, list[float]] = {}
    for grade in (grade for item in graded for grade in item.grades):
        for name, value in grade.parts.items():
            values.setdefault(name, []).append(value)
    means = {name: statistics.fmean(found) for name, found in sorted(values.items())}
    return {"reward_terms": means} if means else {}
