"""One sampling round: prompts -> sampled and graded rollouts. Runs on the coordinator."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from megatron_chord.data.templates import ChatTemplate
from megatron_chord.records import Grade, GradedRollouts, Prompt, Rollout, RolloutRequest, Span
from megatron_chord.rewards.graders import Graders, PendingGrade
from megatron_chord.rewards.response import Response
from megatron_chord.rollout.client import RolloutClient, Stop
from megatron_chord.rollout.replies import GenerateRequest
from megatron_chord.routes import Routes, RouteShape, joined

_CHECK_S = 1.0
"""Seconds between two calls of ``check`` while answers are sampled."""


class TooManyGraderErrors(RuntimeError):
    """More gradings of a step failed than the run allows. Rewards would depend on the grader and not on the policy."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling settings of one call. They are the same for all of its prompts."""

    num_rollouts: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    routes: RouteShape | None = None
    """The shape of the rollouts' routes; None: rollouts have no routes."""
    step: int | None = None
    """The step for which servers keep the routes if they can (``rollout.route_store``). None: the replies contain the
    routes."""


NUM_SEEDS = 2**62
"""``sample_seed`` returns values in [0, ``NUM_SEEDS``)."""
Shaping = Callable[[Grade, str, Rollout, int], float]
"""(grade with a score, text of the whole answer, its sampled rollout, tokens of the whole answer) -> reward"""


def sample_seed(run_seed: int, name: str, position: int) -> int:
    """The seed of the request for a data set's ``position``-th draw.

    It is a pure function, so a resumed run samples the same tokens.
    """
    digest = hashlib.blake2b(f"{run_seed}/{name}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) * NUM_SEEDS >> 64


def sample(  # noqa: PLR0913 (all but the first five have a default)
    clients: Sequence[RolloutClient],
    requests: Sequence[RolloutRequest],
    sampling: Sampling,
    *,
    version: int,
    deadline_s: float,
    may_advance: bool = False,
    on_group: Callable[[int, tuple[Rollout, ...], int], None] | None = None,
    stop_after: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[tuple[Rollout, ...]]:
    """Sample the rollouts of every request, in the order of the requests. They are spread round-robin over the servers.

    Args:
        version: the weight version that must have sampled every new token. Tokens sampled earlier (partial rollouts)
            keep their version.
        may_advance: whether weights may be pushed during the call. If so, later versions are accepted, too.
        on_group: called as soon as one more request is complete, with its index, its rollouts and the number of
            complete requests. Not for those that were complete before. From any thread.
        stop_after: if given, sampling stops as soon as this number of requests is complete, including all with
            ``is_awaited``. The other requests return their unfinished rollouts, with the finish reason `abort`, or an
            empty tuple if nothing was sampled.
        check: called in this thread, first and then about every second. Its exception ends the sampling.

    When an exception ends the sampling, all servers drop its requests.

    Raises:
        RolloutError: a request failed, also after retries. A step never continues with a part of its batch.
        Exception: that of ``on_group`` or ``check``.
    """
    check()
    answered = [request.is_answered for request in requests]

    def may_stop() -> bool:
        awaited = (done for request, done in zip(requests, answered, strict=True) if request.is_awaited)
        return stop_after is not None and sum(answered) >= stop_after and all(awaited)

    if may_stop():
        return [request.partial_rollouts for request in requests]
    parts = [part for index, request in enumerate(requests) for part in _parts_of(index, request, sampling)]
    missing = Counter(part.index for part in parts)
    found = [list(request.partial_rollouts) for request in requests]
    lock, stop = threading.Lock(), Stop()

    def put(part: _RequestPart, rollouts: tuple[Rollout, ...]) -> None:
        if part.rollout_index is None:
            found[part.index] = list(rollouts)
        else:
            found[part.index][part.rollout_index] = _joined(
                requests[part.index].partial_rollouts[part.rollout_index],
                rollouts[0],
                has_all_routes=part.http_request.first_routed == 0,
            )

    def receive(part: _RequestPart, rollouts: tuple[Rollout, ...]) -> None:
        with lock:
            put(part, rollouts)
            missing[part.index] -= 1
            answered[part.index] = missing[part.index] == 0
            is_complete, num_answered, ends = answered[part.index], sum(answered), may_stop()
        if ends:
            stop()
        if is_complete and on_group is not None:
            on_group(part.index, tuple(found[part.index]), num_answered)

    def serve(server: int) -> list[tuple[Rollout, ...]]:
        share = parts[server :: len(clients)]
        return clients[server].generate(
            [part.http_request for part in share],
            version=version,
            deadline_s=deadline_s,
            may_advance=may_advance,
            on_answer=lambda index, rollouts: receive(share[index], rollouts),
            stop=stop if stop_after is not None else None,
        )

    shares = _served(clients, serve, check)
    for index, part in enumerate(parts):
        if not answered[part.index]:
            put(part, shares[index % len(clients)][index // len(clients)])
    return [tuple(group) if any(rollout.token_ids for rollout in group) else () for group in found]


def _served(
    clients: Sequence[RolloutClient],
    serve: Callable[[int], list[tuple[Rollout, ...]]],
    check: Callable[[], None],
) -> list[list[tuple[Rollout, ...]]]:
    """Call ``serve`` for all servers at the same time, each in a thread, and ``check`` about every second.

    The first exception of any of them is raised at once, and the requests to all servers are cancelled.
    """
    pool = ThreadPoolExecutor(len(clients))
    try:
        running = [pool.submit(serve, server) for server in range(len(clients))]
        while wait(running, _CHECK_S, FIRST_EXCEPTION).not_done:
            for future in running:
                if future.done():
                    future.result()
            check()
        return [future.result() for future in running]
    except BaseException:
        for client in clients:
            client.cancel()
        raise
    finally:
        # Do not wait for the threads: after a signal the server is stopped next, which ends their requests.
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class _RequestPart:
    """One HTTP request; a ``RolloutRequest`` has one or more of them."""

    index: int
    rollout_index: int | None
    """Index of the rollout that is continued. None if all rollouts of the request are sampled from the beginning."""
    http_request: GenerateRequest


def _parts_of(index: int, request: RolloutRequest, sampling: Sampling) -> list[_RequestPart]:
    def http_request(
        partial_rollouts: tuple[int, ...], num_rollouts: int, seed: int, num_routed: int = 0
    ) -> GenerateRequest:
        return GenerateRequest(
            prompt_ids=request.prompt.token_ids + request.prefix + partial_rollouts,
            num_rollouts=num_rollouts,
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
                index=index,
                rollout_index=None,
                http_request=http_request((), sampling.num_rollouts, request.seed),
            )
        ]
    return [
        _RequestPart(
            index=index,
            rollout_index=rollout_index,
            http_request=http_request(
                rollout.token_ids,
                1,
                sample_seed(request.seed, f"from {len(rollout.token_ids)}", rollout_index),
                len(rollout.routes) if sampling.routes is not None and rollout.routes is not None else 0,
            ),
        )
        for rollout_index, rollout in enumerate(request.partial_rollouts)
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


class Grading:
    """The grading of one round. It may begin while other answers are still sampled. Use it as a context manager.

    Each answer is decoded and graded as the assistant's whole turn (``ChatTemplate.turn``). The grades do not depend on
    when an answer was added.
    """

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        *,
        template: ChatTemplate,
        graders: Graders,
        max_error_rate: float,
        num_answers: int | None = None,
    ) -> None:
        """
        Args:
            num_answers: number of answers that ``finish`` will get, if it is known before. ``add`` then raises as soon
                as too many gradings have failed.
        """
        self._requests = requests
        self._template = template
        self._graders = graders
        self._max_error_rate = max_error_rate
        self._num_answers = num_answers
        self._groups: dict[int, _PendingGroup] = {}
        """The groups that are being graded, by their index in ``requests``."""
        self._has_ended = False
        self._lock = threading.Lock()  # for the two attributes below
        self._unchecked: deque[PendingGrade] = deque()
        self._errors: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel the gradings that have not begun. There are none after ``finish``."""
        self._has_ended = True
        for index in list(self._groups):
            self._cancel(index)

    def add(self, index: int, rollouts: Sequence[Rollout]) -> None:
        """Start to grade the complete rollouts of ``requests[index]``. From any thread, once for each request.

        It has no effect after the end of the block: when one server fails, others may still sample.

        Raises:
            TooManyGraderErrors: more gradings than ``max_error_rate`` of ``num_answers`` have failed so far.
            RuntimeError: the graders are closed.
        """
        if self._has_ended:
            return
        request = self._requests[index]
        texts = _texts(request, rollouts, self._template)
        grades = tuple(
            self._graders.submit(response_to(request, rollout, text))
            for rollout, text in zip(rollouts, texts, strict=True)
        )
        self._groups[index] = _PendingGroup(texts=texts, grades=grades)
        if self._num_answers is not None:
            self._check(grades, self._num_answers)

    def finish(
        self,
        taken: Sequence[int],
        sampled: Sequence[tuple[Rollout, ...]],
        shaping: Shaping | None = None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> list[GradedRollouts]:
        """The graded rollouts of the requests with the indices ``taken``, in that order. Other requests do not count.

        Args:
            sampled: the rollouts of every request. Those that were not added before are graded now.
            shaping: without it the rewards are the scores.
            check: called in this thread while it waits for grades. Its exception ends the wait.

        Raises:
            TooManyGraderErrors: more than ``max_error_rate`` of the gradings failed.
            RuntimeError: the graders are closed.
            Exception: that of ``check``.
        """
        self._num_answers = None  # all errors are counted below
        for index in set(self._groups) - set(taken):
            self._cancel(index)
        for index in taken:
            if index not in self._groups:
                self.add(index, sampled[index])
        groups = [self._groups[index] for index in taken]
        grades = self._graders.wait([grade for group in groups for grade in group.grades], check=check)
        errors = [grade.error for grade in grades if grade.error is not None]
        if len(errors) > self._max_error_rate * len(grades):
            raise self._too_many(str(len(errors)), len(grades), errors[0])
        return _assembled(
            [self._requests[index] for index in taken],
            [sampled[index] for index in taken],
            [group.texts for group in groups],
            grades,
            shaping,
        )

    def _check(self, grades: Sequence[PendingGrade], num_answers: int) -> None:
        with self._lock:
            self._unchecked += grades
            while self._unchecked and self._unchecked[0].is_done():
                error = self._unchecked.popleft().error()
                if error is not None:
                    self._errors.append(error)
            if len(self._errors) > self._max_error_rate * num_answers:
                raise self._too_many(f"at least {len(self._errors)}", num_answers, self._errors[0])

    def _too_many(self, failed: str, num_answers: int, first: str) -> TooManyGraderErrors:
        return TooManyGraderErrors(
            f"{failed} of {num_answers} gradings failed (reward.max_error_rate {self._max_error_rate}); "
            f"the first error: {first}"
        )

    def _cancel(self, index: int) -> None:
        for grade in self._groups[index].grades:
            grade.cancel()


@dataclass(frozen=True, kw_only=True)
class _PendingGroup:
    """One request's decoded answers, whose gradings have been started."""

    texts: tuple[str, ...]
    grades: tuple[PendingGrade, ...]


def graded_before(
    requests: Sequence[RolloutRequest],
    sampled: Sequence[tuple[Rollout, ...]],
    grades: Sequence[Grade],
    *,
    template: ChatTemplate,
    shaping: Shaping,
) -> list[GradedRollouts]:
    """Like ``Grading.finish``, but with existing grades: one for each rollout of every request, in order."""
    texts = [_texts(request, group, template) for request, group in zip(requests, sampled, strict=True)]
    return _assembled(requests, sampled, texts, grades, shaping)


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


def _texts(request: RolloutRequest, rollouts: Sequence[Rollout], template: ChatTemplate) -> tuple[str, ...]:
    return tuple(
        template.turn(request.prompt.token_ids, request.prefix + rollout.token_ids) for rollout in rollouts
    )


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
