"""GHPO: which prompts are sampled again, with which hint, and which group is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import RunConfig
from megatron_chord.config_methods import GHPOConfig
from megatron_chord.methods.ghpo import GHPO, Trial, beginning, hinted, is_all_wrong, trials_to_repeat
from megatron_chord.methods.table import method_of
from megatron_chord.sampling.rounds import TooManyGraderErrors
from tests.support.scripted import ScriptedContext, WordTemplate, graded, prompt
from tests.support.tiny import tiny_run
from tests.unit.methods.guided import assert_refused

SOLUTION = "abcdefgh"
WRONG, MIXED = (0.0, 0.0), (1.0, 0.0)
CUE = "cue"
TEMPLATE: Any = WordTemplate()
NOBODY: Any = None


def run_of(*, limit: int = 100, **changes: Any) -> RunConfig:
    run = tiny_run(Path("model"), method="ghpo", **changes)
    data = replace(run.data, aligned=True, max_prompt_tokens=limit)
    return replace(run, data=data, batch=replace(run.batch, demonstrations=0))


def draw_of(scores: dict[tuple[str, str], Any], *, step: int = 0, **changes: Any) -> Any:
    answer = (*(ord(letter) for letter in SOLUTION), 0)
    return ScriptedContext(
        run=run_of(**changes),
        scores=scores,
        demonstrations=dict.fromkeys("abc", answer),
        step=step,
        template=WordTemplate(),
    )


def text(token_ids: Any) -> str:
    return "".join(map(chr, token_ids))


# ---- a hint


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, "ab"), (0.5, "abcd"), (0.75, "abcdef"), (0.3, "ab"), (0.33, "abc"), (0.01, "")],
)
def test_a_hint_is_cut_by_characters(share: float, expected: str) -> None:
    assert beginning(SOLUTION, share) == expected


def test_the_hint_stands_after_the_last_message_and_is_rendered_as_every_prompt_is() -> None:
    plain = prompt("a", text="2+2?")
    harder = hinted(plain, "two", cue=CUE, template=TEMPLATE)
    assert harder.messages == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "2+2?\ncue\ntwo"},
    )
    assert text(harder.token_ids) == "s2+2?\ncue\ntwo"
    assert (harder.id, harder.truth) == (plain.id, plain.truth)
    assert plain.messages[-1]["content"] == "2+2?"


# ---- which prompts get a hint


@pytest.mark.parametrize(
    ("scores", "at_most", "wrong"),
    [
        ((0.0, 0.0), 0.0, True),
        ((0.0, -1.0, None), 0.0, True),
        ((0.0, 0.1), 0.0, False),
        ((0.0, 0.1), 0.1, True),
        ((None, None), 0.0, False),
    ],
)
def test_all_wrong(scores: Any, at_most: float, wrong: bool) -> None:
    assert is_all_wrong(graded(prompt("a"), scores), wrong_at_most=at_most) is wrong


def test_a_right_answer_whose_form_is_punished_is_not_wrong() -> None:
    answers = replace(graded(prompt("a"), (1.0, 0.0)), rewards=(-0.5, -0.5))
    assert not is_all_wrong(answers, wrong_at_most=0.0)


def test_a_prompt_whose_hint_was_refused_is_not_asked_again() -> None:
    trials = [Trial(drawn=NOBODY, graded=graded(prompt("a"), scores)) for scores in (WRONG, MIXED, WRONG)]
    assert trials_to_repeat(trials, wrong_at_most=0.0) == [0, 2]
    assert trials_to_repeat([replace(trials[0], refused=True), *trials[1:]], wrong_at_most=0.0) == [2]


# ---- a step


SCORES: dict[tuple[str, str], Any] = {
    ("", "a"): WRONG,
    ("", "b"): MIXED,
    ("", "c"): WRONG,
    ("hint1", "a"): WRONG,
    ("hint1", "c"): MIXED,
    ("hint2", "a"): WRONG,
    ("hint3", "a"): MIXED,
}


def test_each_stage_asks_those_that_are_still_all_wrong() -> None:
    context = draw_of(SCORES, advantage="group_mean")
    collected = GHPO(settings=GHPOConfig(cue=CUE)).collect(context)
    asked = [
        (attempt, [(item.prompt.id, item.position) for item in drawn], samples)
        for attempt, drawn, samples in context.asked
    ]
    assert asked == [
        ("", [("a", 100), ("b", 101), ("c", 102)], 2),
        ("hint1", [("a", 100), ("c", 102)], 2),
        ("hint2", [("a", 100)], 2),
        ("hint3", [("a", 100)], 2),
    ]
    prompts = [text(sample.token_ids[:-2]) for sample in collected.samples]
    assert prompts == ["s?\ncue\nabcdef"] * 2 + ["\x05\x06"] * 2 + ["s?\ncue\nab"] * 2
    assert [sample.parts[0].constants["advantage"] for sample in collected.samples] == [0.5, -0.5] * 3
    # A hint is part of the prompt: only the two answer tokens are trained.
    assert [len(sample.parts[0].positions) for sample in collected.samples] == [2] * 6
    assert {sample.parts[0].term for sample in collected.samples} == {"policy"}
    assert collected.weights == {"policy": 1.0}
    # Rewards of the rollouts without hints: one of six. Hints helped two of three prompts, at the stages 3 and 1.
    assert collected.stats["reward_mean"] == pytest.approx(1 / 6)
    assert collected.stats["hinted_groups"] == pytest.approx(2 / 3)
    assert collected.stats["hint_stage"] == 2.0
    assert collected.stats["hints_too_long"] == 0
    assert collected.stats["hinted_reward_mean"] == 0.5


def test_a_prompt_that_stays_wrong_is_trained_with_its_last_hint() -> None:
    scores = {**SCORES, ("hint3", "a"): WRONG}
    collected = GHPO(settings=GHPOConfig(cue=CUE)).collect(draw_of(scores))
    assert text(collected.samples[0].token_ids[:-2]) == "s?\ncue\nabcdef"
    assert collected.samples[0].parts[0].constants["advantage"] == 0.0
    dropped = GHPO(settings=GHPOConfig(cue=CUE)).collect(draw_of(scores, equal_groups="drop"))
    assert len(dropped.samples) == 4


def test_no_hints_before_the_start() -> None:
    context = draw_of(SCORES, step=4)
    collected = GHPO(settings=GHPOConfig(start_step=5)).collect(context)
    assert [attempt for attempt, *_ in context.asked] == [""]
    assert collected.stats["hinted_groups"] == collected.stats["hint_stage"] == 0.0
    assert "hinted_reward_mean" not in collected.stats
    later = draw_of(SCORES, step=5)
    GHPO(settings=GHPOConfig(start_step=5)).collect(later)
    assert len(later.asked) == 4


def test_a_hint_beyond_the_prompt_limit_leaves_the_last_group() -> None:
    # "s?\ncue\nab" has 9 tokens, and with "abcd" it has 11.
    context = draw_of(SCORES, limit=10)
    collected = GHPO(settings=GHPOConfig(cue=CUE)).collect(context)
    assert [attempt for attempt, *_ in context.asked] == ["", "hint1"]
    assert text(collected.samples[0].token_ids[:-2]) == "s?\ncue\nab"
    assert collected.stats["hints_too_long"] == 1
    assert collected.stats["hint_stage"] == 1.0
    none = GHPO(settings=GHPOConfig(cue=CUE)).collect(draw_of(SCORES, limit=8))
    assert none.stats["hints_too_long"] == 2
    assert none.stats["hinted_groups"] == 0.0


def test_groups_whose_grading_failed_are_left_out() -> None:
    scores: dict[tuple[str, str], Any] = {**SCORES, ("hint1", "c"): (None, 1.0), ("", "b"): (None, 0.0)}
    context = draw_of({**scores, ("hint1", "b"): MIXED})
    collected = GHPO(settings=GHPOConfig(cue=CUE)).collect(context)
    assert [item.prompt.id for item in context.asked[1][1]] == ["a", "b", "c"]
    assert len(collected.samples) == 4
    assert collected.stats["dropped_groups"] == 1
    with pytest.raises(TooManyGraderErrors):
        GHPO().collect(draw_of({("", name): (None, None) for name in "abc"}))


@pytest.mark.parametrize(
    ("settings", "batch", "reason"),
    [
        ({"stages": 0}, {}, "method.stages must be >= 1"),
        ({"stages": 4}, {}, r"method.stages 4 x method.stage_share 0.25 must lie in \(0, 1\)"),
        ({"stage_share": 0.0}, {}, r"must lie in \(0, 1\)"),
        ({"start_step": 10}, {}, r"method.start_step 10 must be below the run's steps, 10"),
        ({"start_step": -1}, {}, "method.start_step must be >= 0"),
        ({}, {"sampling_attempts": 2}, "batch.sampling_attempts: dynamic sampling would replace"),
    ],
)
def test_refusals(settings: Any, batch: Any, reason: str) -> None:
    assert_refused(lambda: run_of(settings=settings), batch=batch, reason=reason)


def test_it_needs_demonstrations() -> None:
    method_of(run_of())
    with pytest.raises(ValueError, match="needs every prompt's own demonstration"):
        method_of(tiny_run(Path("model"), method="ghpo"))
