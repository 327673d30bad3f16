"""Sampling stops when enough prompts are complete, and is continued later from the tokens so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_chord.records import Prompt, Rollout, RolloutRequest
from megatron_chord.rewards.response import Response
from megatron_chord.routes import RouteShape
from megatron_chord.sampling.recorded import rollout_json, rollout_of
from megatron_chord.sampling.rounds import Sampling, response_to, sample
from tests.support.decoding import END, DecodingClient

SAMPLING = Sampling(num_rollouts=2, temperature=1.0, max_tokens=12, stop_token_ids=(END,))
LENGTHS = {100: (3, 5), 101: (2, 9), 102: (4, 4), 103: (12, 30)}
"""The last answer is longer than the limit."""


def asks(numbers: Sequence[int] = tuple(LENGTHS)) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            prompt=Prompt(id=str(number), messages=(), truth="", token_ids=(number,)), seed=7 * number
        )
        for number in numbers
    ]


def sampled(
    client: Any,
    asked: Sequence[RolloutRequest],
    *,
    version: int = 0,
    sampling: Sampling = SAMPLING,
    **more: Any,
) -> list[tuple[Rollout, ...]]:
    return sample([client], asked, sampling, version=version, deadline_s=1, **more)


def continued(asked: Sequence[RolloutRequest], groups: Sequence[tuple[Rollout, ...]]) -> list[RolloutRequest]:
    return [replace(ask, partial_rollouts=group) for ask, group in zip(asked, groups, strict=True)]


def lengths(groups: Sequence[tuple[Rollout, ...]]) -> list[list[int]]:
    return [[len(rollout.token_ids) for rollout in group] for group in groups]


def reasons(groups: Sequence[tuple[Rollout, ...]]) -> list[list[str]]:
    return [[rollout.finish_reason for rollout in group] for group in groups]


def test_it_stops_when_enough_prompts_are_answered() -> None:
    told: list[tuple[int, tuple[Rollout, ...], int]] = []
    groups = sampled(
        DecodingClient(LENGTHS), asks(), stop_after=2, on_group=lambda *group: told.append(group)
    )
    # 102 is answered at token 4 and 100 at token 5.
    assert lengths(groups) == [[3, 5], [2, 5], [4, 4], [5, 5]]
    assert reasons(groups) == [["stop", "stop"], ["stop", "abort"], ["stop", "stop"], ["abort", "abort"]]
    assert told == [(2, groups[2], 1), (0, groups[0], 2)]


def test_without_enough_everything_is_answered() -> None:
    groups = sampled(DecodingClient(LENGTHS), asks())
    assert lengths(groups) == [[3, 5], [2, 9], [4, 4], [12, 12]]
    assert reasons(groups)[3] == ["stop", "length"]


def test_only_unfinished_answers_are_continued_and_each_token_keeps_its_own_weights() -> None:
    first = sampled(DecodingClient(LENGTHS), asks(), stop_after=2)
    client = DecodingClient(LENGTHS)
    again = continued(asks(), first)
    second = sampled(client, again, version=3)
    assert [(request.prompt_ids, request.num_rollouts, request.max_tokens) for request in client.asked] == [
        ((101, 11, 50, 50, 50, 50), 1, 7),
        ((103, 10, 50, 50, 50, 50), 1, 7),
        ((103, 11, 50, 50, 50, 50), 1, 7),
    ]
    assert (second[0], second[2]) == (first[0], first[2])
    assert second[1][0] == first[1][0]
    assert lengths(second) == [[3, 5], [2, 9], [4, 4], [12, 12]], "as if it had never stopped"
    assert reasons(second) == [["stop", "stop"], ["stop", "stop"], ["stop", "stop"], ["stop", "length"]]
    rollout = second[1][1]
    assert rollout.token_ids == (11, *[50] * 7, END)
    assert rollout.logprobs == (0, -0.001, -0.002, -0.003, -0.004, -3.005, -3.006, -3.007, -3.008)
    assert rollout.spans == ((0, 5), (3, 4))
    assert rollout.weight_version == 0


def test_an_answer_may_be_stopped_again_and_again() -> None:
    long = asks([103, 100])
    groups = [tuple[Rollout, ...](), ()]
    for version in (4, 4, 6):  # the same weights twice count as one span
        groups = [
            sampled(DecodingClient(LENGTHS), continued(long, [groups[0], ()]), version=version, stop_after=1)[
                0
            ],
            (),
        ]
    assert groups[0][0].spans == ((4, 10), (6, 2))
    assert reasons(groups[:1]) == [["stop", "length"]]
    assert lengths(groups[:1]) == [[12, 12]]


def test_what_enough_were_answered_before_is_not_sampled() -> None:
    client = DecodingClient(LENGTHS)
    answered = continued(asks()[:2], sampled(client, asks()[:2]))
    client.asked.clear()
    groups = sampled(client, [*answered, *asks()[2:]], stop_after=2)
    assert client.asked == []
    assert groups == [answered[0].partial_rollouts, answered[1].partial_rollouts, (), ()]


def test_it_does_not_stop_before_what_is_awaited_is_answered() -> None:
    awaited = asks()
    awaited[1] = replace(awaited[1], is_awaited=True)
    groups = sampled(DecodingClient(LENGTHS), awaited, stop_after=2)
    assert lengths(groups) == [[3, 5], [2, 9], [4, 4], [9, 9]]
    answered = continued(asks()[:1], groups[:1])
    groups = sampled(DecodingClient(LENGTHS), [*answered, *awaited[1:3]], stop_after=1)
    assert lengths(groups) == [[3, 5], [2, 9], [4, 4]], "enough are answered, but for it"


def test_a_continuation_has_a_seed_of_its_own() -> None:
    """With the seed of the first request, the continuation would use the same random numbers again."""
    first = sampled(DecodingClient(LENGTHS), asks(), stop_after=2)
    seeds: list[int] = []
    for _ in range(2):
        client = DecodingClient(LENGTHS)
        sampled(client, continued(asks(), first))
        seeds.append(tuple(request.seed for request in client.asked))  # type: ignore[arg-type]
    assert seeds[0] == seeds[1], "a function of the draw"
    assert len({*seeds[0], *(ask.seed for ask in asks())}) == 3 + 4  # type: ignore[misc]


def test_what_was_not_begun_is_asked_for_as_a_whole() -> None:
    """The request was stopped while it waited in the server's queue, so it is sent again as a whole."""

    class Busy(DecodingClient):
        def generate(self, requests: Any, **settings: Any) -> Any:
            (answered,) = super().generate(requests[:1], **settings)
            waiting = Rollout(token_ids=(), logprobs=(), finish_reason="abort", weight_version=0)
            return [answered, *[(waiting, waiting)] * (len(requests) - 1)]

    groups = sampled(Busy(LENGTHS), asks(), stop_after=1)
    assert groups[1:] == [(), (), ()]
    client = DecodingClient(LENGTHS)
    sampled(client, continued(asks()[1:], groups[1:]))
    assert [(request.prompt_ids, request.num_rollouts, request.seed) for request in client.asked] == [
        ((number,), 2, 7 * number) for number in (101, 102, 103)
    ]


def test_rollouts_of_several_versions_survive_a_file() -> None:
    groups = sampled(DecodingClient(LENGTHS), asks(), stop_after=2)
    groups += sampled(DecodingClient(LENGTHS), continued(asks(), groups), version=3)
    for rollout in (rollout for group in groups for rollout in group):
        assert rollout_of(json.loads(json.dumps(rollout_json(rollout)))) == rollout


def test_a_continued_answer_has_the_routes_of_both_parts() -> None:
    """A token's route names the weights that computed it: the tokens before the stop keep the first."""
    shape = RouteShape(layers=1, experts=8, chosen=1)
    routed = replace(SAMPLING, routes=shape)

    class Routing(DecodingClient):
        def _rollouts(self, request: Any, answers: Any, version: int) -> tuple[Rollout, ...]:
            rollouts = super()._rollouts(request, answers, version)
            before = len(request.prompt_ids) - 1 - request.first_routed
            rows = [before + len(rollout.token_ids) for rollout in rollouts]
            routes = [np.full((count, 1, 1), version, np.uint8) for count in rows]
            pairs = zip(rollouts, routes, strict=True)
            return tuple(replace(rollout, routes=own) for rollout, own in pairs)

    first = sampled(Routing(LENGTHS), asks(), sampling=routed, stop_after=2)
    client = Routing(LENGTHS)
    again = sampled(client, continued(asks(), first), sampling=routed, version=3)
    assert {request.first_routed for request in client.asked} == {5}, "the prompt, and four of five tokens"
    rollout = again[1][1]
    assert isinstance(rollout.routes, np.ndarray)
    assert rollout.routes[:, 0, 0].tolist() == [0] * 5 + [3] * 4
    without = continued(asks(), [tuple(replace(one, routes=None) for one in group) for group in first])
    rollout = sampled(Routing(LENGTHS), without, sampling=routed, version=3)[1][1]
    assert isinstance(rollout.routes, np.ndarray)
    assert rollout.routes[:, 0, 0].tolist() == [3] * 9, "all of them, if the first part has none"
    unrouted = sampled(DecodingClient(LENGTHS), continued(asks(), first), sampling=routed, version=3)
    assert unrouted[1][1].routes is None, "another server that returns none"


@pytest.mark.parametrize("spans", [((1, 1), (2, 2)), ((2, 1), (3, 1))])
def test_spans_agree_with_the_rest_of_a_rollout(spans: Any) -> None:
    with pytest.raises(AssertionError):
        Rollout(token_ids=(5, 6), logprobs=(0, 0), finish_reason="stop", weight_version=1, spans=spans)


def test_a_grader_is_given_the_whole_answer_and_its_prompts_row() -> None:
    prompt = Prompt(
        id="1",
        messages=({"role": "user", "content": "?"},),
        truth="4",
        token_ids=(1,),
        source="math",
        fields={"level": 3},
    )
    rollout = Rollout(token_ids=(5, 6), logprobs=(-1.0, -2.0), finish_reason="length", weight_version=0)
    ask = RolloutRequest(prompt=prompt, seed=0, prefix=(7, 8, 9))
    assert response_to(ask, rollout, "so 4") == Response(
        text="so 4",
        truth="4",
        messages=({"role": "user", "content": "?"},),
        fields={"level": 3},
        finish_reason="length",
        num_tokens=5,
        source="math",
    )
