"""Answers from a checkpoint are equal bit for bit, and are refused for requests that differ from the recorded ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chord.records import Grade, GradedRollouts, Rollout, RolloutRequest
from megatron_chord.routes import RouteShape
from megatron_chord.sampling.recorded import SamplingRound, answers_to, to_json
from megatron_chord.sampling.rounds import Sampling
from megatron_chord.train.arrays import read_arrays, with_arrays_of, without_arrays, write_arrays
from tests.support.scripted import graded, prompt

SAMPLING = Sampling(num_rollouts=2, temperature=0.1, max_tokens=7, stop_token_ids=(1, 2))
ASKS = [RolloutRequest(prompt=prompt("a"), seed=1), RolloutRequest(prompt=prompt("b"), seed=2, prefix=(8, 9))]
ODD = (-0.1, -1e-17, -2.2250738585072014e-308, -12.345678901234567)
"""Log-probs that a careless format would round."""


def answers() -> list[GradedRollouts]:
    first, second = graded(ASKS[0].prompt, (1.0, None)), graded(ASKS[1].prompt, (0.1, 0.0), prefix=(8, 9))
    odd = Rollout(
        token_ids=(3, 4, 5, 6),
        logprobs=ODD,
        finish_reason="length",
        weight_version=12,
        spans=((13, 1), (12, 3)),
    )
    of_terms = Grade(0.1, None, {"math": 0.1, "judge": 1 / 3})
    return [replace(first, rollouts=(odd, first.rollouts[1]), grades=(of_terms, first.grades[1])), second]


def through_a_file(given: list[GradedRollouts], sampling: Sampling | None) -> Any:
    call = SamplingRound(
        sampling=sampling,
        requests=ASKS,
        sampled=[item.rollouts for item in given],
        grades=[item.grades for item in given],
    )
    return json.loads(json.dumps(to_json(call)))


@pytest.mark.parametrize("sampling", [SAMPLING, None])
def test_the_same_answers_come_back(sampling: Sampling | None) -> None:
    given = answers()
    sampled, grades = answers_to(ASKS, sampling, through_a_file(given, sampling))
    assert sampled == [item.rollouts for item in given]
    assert grades == [item.grades for item in given]
    assert sampled[0][0].logprobs == ODD


def test_routes_come_back_from_their_own_file(tmp_path: Path) -> None:
    given = answers()
    routes = np.arange(24, dtype=np.uint16).reshape(4, 2, 3)
    routed = replace(given[0].rollouts[0], routes=routes)
    given[0] = replace(given[0], rollouts=(routed, given[0].rollouts[1]))
    call = SamplingRound(
        sampling=replace(SAMPLING, routes=RouteShape(layers=2, experts=300, chosen=3)),
        requests=ASKS,
        sampled=[item.rollouts for item in given],
        grades=[item.grades for item in given],
    )
    plain, arrays = without_arrays({"rounds": [to_json(call)]})
    write_arrays(tmp_path / "routes", arrays)
    recorded = with_arrays_of(json.loads(json.dumps(plain)), read_arrays(tmp_path / "routes"))
    sampled, grades = answers_to(ASKS, SAMPLING, recorded["rounds"][0])
    assert sampled == [item.rollouts for item in given]
    assert grades == [item.grades for item in given]
    found = sampled[0][0].routes
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, routes)
    assert [rollout.routes for rollout in (*sampled[0][1:], *sampled[1])] == [None] * 3
    (tmp_path / "routes").write_bytes(b"no file of arrays")
    with pytest.raises(ValueError, match="routes cannot be read"):
        read_arrays(tmp_path / "routes")


def test_answers_of_a_checkpoint_from_before_there_were_spans() -> None:
    recorded = through_a_file(answers(), SAMPLING)
    for answer in recorded["answers"]:
        for row in answer["rollouts"]:
            del row["spans"]
    sampled, _ = answers_to(ASKS, SAMPLING, recorded)
    assert sampled[0][0].all_spans == ((12, 4),)


@pytest.mark.parametrize(
    ("asks", "sampling", "reason"),
    [
        (ASKS, replace(SAMPLING, temperature=0.2), "'temperature': 0.1.* but .*'temperature': 0.2"),
        (ASKS, replace(SAMPLING, num_rollouts=3), "'num_rollouts': 3"),
        (ASKS, None, "None is requested"),
        (ASKS[:1], SAMPLING, "prompts a, b were recorded, but those to a are requested"),
        (ASKS[::-1], SAMPLING, "those to b, a are requested"),
        (
            [ASKS[0], replace(ASKS[1], prefix=(8,))],
            SAMPLING,
            "prompts a, b were sampled with other prefixes",
        ),
    ],
)
def test_other_requests_are_refused(
    asks: list[RolloutRequest], sampling: Sampling | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        answers_to(asks, sampling, through_a_file(answers(), SAMPLING))
