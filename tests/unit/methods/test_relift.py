"""ReLIFT: which demonstrations are collected, when they are trained, and that they wait in the right order."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_chord.config import RunConfig
from megatron_chord.config_methods import ReLIFTConfig
from megatron_chord.methods.base import Collected
from megatron_chord.methods.relift import ReLIFT
from megatron_chord.methods.table import method_of
from tests.support.tiny import terms_of
from tests.unit.methods.guided import BROKEN, RIGHT, WRONG, answer, guided_run, scripted_draw


def step(
    run: RunConfig, lasts: list[tuple[int, ...]], *, size: int, memory: list[str] | None = None
) -> Collected:
    """Collect a step. ``lasts`` has the last token of each rollout of each prompt."""
    answers = [[answer(last) for last in of_prompt] for of_prompt in lasts]
    context = scripted_draw(run, answers, [RIGHT] * len(lasts))
    context.memory = memory
    return ReLIFT(settings=ReLIFTConfig(size=size)).collect(context)


LASTS = [(WRONG, WRONG, WRONG), (WRONG, RIGHT, WRONG), (WRONG, BROKEN, WRONG)]
"""Prompts 0 and 2 fail; a rollout whose grading failed does not count."""


def test_the_oldest_demonstrations_are_trained_when_enough_wait() -> None:
    run = guided_run("relift", prompts=3, advantage="group_mean")
    waits = step(run, LASTS, size=4)
    assert waits.extra is None
    assert sorted(waits.memory) == ["0", "2"]
    assert (waits.stats["failed_prompts"], waits.stats["waiting_demonstrations"]) == (2 / 3, 2)

    trains = step(run, LASTS, size=3, memory=["1", "2"])
    assert trains.extra is not None
    first = waits.memory[0]
    assert [sample.token_ids.tolist() for sample in trains.extra.samples] == [
        [100 + int(name), 3, 30, 31, RIGHT] for name in ("1", "2", first)
    ]
    assert [sample.parts[0].positions.tolist() for sample in trains.extra.samples] == [[2, 3, 4]] * 3
    assert trains.extra.weights == {"sft": 1.0}
    assert trains.memory == waits.memory[1:] == json.loads(json.dumps(trains.memory))
    assert trains.stats["sft_updates"] == 1


def test_rollouts_of_failed_prompts_stay_in_the_policy_loss() -> None:
    run = guided_run("relift", prompts=3, advantage="group_mean")
    collected = step(run, LASTS, size=1)
    assert {part.term for sample in collected.samples for part in sample.parts} == {"policy"}
    assert len(collected.samples) == 3 + 3 + 2
    assert collected.weights == {"policy": 1.0}


def test_the_entropy_belongs_to_the_sft_update() -> None:
    run = guided_run("relift", settings={"entropy_coefficient": 0.5})
    terms = terms_of(run)
    assert {name: term.entropy_bonus for name, term in terms.items()} == {"policy": 0.0, "sft": 0.5}


@pytest.mark.parametrize(
    ("settings", "batch", "objective", "reason"),
    [
        ({}, {"sampling_attempts": 2}, {}, "would replace the prompts whose rollouts are all wrong"),
        ({}, {}, {"entropy_bonus": 0.1, "entropy_bonus_on": "all"}, r"set method\.entropy_coefficient"),
        ({"size": 0}, {}, {}, r"method\.size must be >= 1"),
        ({"sft_lr": 0.0}, {}, {}, r"method\.sft_lr must be > 0"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any], batch: dict[str, Any], objective: dict[str, Any], reason: str
) -> None:
    def build() -> None:
        run = guided_run("relift", settings=settings, **objective)
        method_of(replace(run, batch=replace(run.batch, **batch)))

    with pytest.raises(ValueError, match=reason):
        build()
