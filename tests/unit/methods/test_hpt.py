"""HPT: which prompts are trained by SFT, and how the two branches are weighted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.config import RunConfig
from megatron_chord.config_methods import HPTConfig
from megatron_chord.losses.terms import empty_output
from megatron_chord.methods.hpt import HPT, mean_score
from megatron_chord.methods.table import method_of
from megatron_chord.sampling.rounds import TooManyGraderErrors
from tests.support.scripted import ScriptedContext, graded, prompt
from tests.support.tiny import terms_of, tiny_run
from tests.unit.methods.guided import assert_refused

DEMONSTRATIONS = {"a": (40, 41, 42), "b": (50, 51), "c": (60,)}
SCORES: dict[tuple[str, str], Any] = {("", "a"): (0.0, 0.0), ("", "b"): (1.0, 0.0), ("", "c"): (1.0, 1.0)}


def run_of(**changes: Any) -> RunConfig:
    run = tiny_run(Path("model"), method="hpt", **changes)
    return replace(run, data=replace(run.data, aligned=True), batch=replace(run.batch, demonstrations=0))


def draw_of(scores: dict[tuple[str, str], Any], **changes: Any) -> Any:
    return ScriptedContext(run=run_of(**changes), scores=scores, demonstrations=DEMONSTRATIONS)


def test_all_wrong_prompts_are_trained_by_sft_and_the_others_by_grpo() -> None:
    # One of three prompts is at or below the gate of 0, so the weights are 2/3 and 1/3. The group (1, 0) has the
    # unbiased standard deviation sqrt(1/2) and advantages of +- 0.5 sqrt(2). The group (1, 1) has none.
    collected = HPT().collect(draw_of(SCORES, advantage_eps=1e-9))
    assert collected.weights == {"policy": pytest.approx(2 / 3), "sft": pytest.approx(1 / 3)}
    found = [
        (s.token_ids.tolist(), s.parts[0].term, s.parts[0].constants.get("advantage"))
        for s in collected.samples
    ]
    assert found == [
        ([5, 6, 20, 21], "policy", pytest.approx(0.5**0.5)),
        ([5, 6, 30, 31], "policy", pytest.approx(-(0.5**0.5))),
        ([5, 6, 20, 21], "policy", 0.0),
        ([5, 6, 30, 31], "policy", 0.0),
        ([5, 6, 40, 41, 42], "sft", None),
    ]
    assert collected.samples[-1].parts[0].positions.tolist() == [2, 3, 4]
    assert collected.stats["sft_prompts"] == pytest.approx(1 / 3)
    assert collected.stats["reward_mean"] == 0.5
    assert collected.stats["dropped_groups"] == 0


def test_a_prompt_exactly_at_the_gate_is_trained_by_sft() -> None:
    collected = HPT(settings=HPTConfig(gate=0.5, sft_coefficient=0.3)).collect(draw_of(SCORES))
    assert [sample.parts[0].term for sample in collected.samples] == ["policy", "policy", "sft", "sft"]
    assert collected.weights == {"policy": pytest.approx(1 / 3), "sft": pytest.approx(0.2)}


@pytest.mark.parametrize(
    ("score", "terms", "weights"),
    [
        (0.0, {"sft"}, {"policy": 0.0, "sft": 1.0}),
        (1.0, {"policy"}, {"policy": 1.0, "sft": 0.0}),
    ],
)
def test_a_step_of_one_kind(score: float, terms: set[str], weights: dict[str, float]) -> None:
    collected = HPT().collect(draw_of(dict.fromkeys(SCORES, (score, score))))
    assert {sample.parts[0].term for sample in collected.samples} == terms
    assert collected.weights == weights


def test_equal_weights_do_not_depend_on_the_shares() -> None:
    method = HPT(settings=HPTConfig(branch_weights="equal", sft_coefficient=0.25))
    assert method.weights([True, False, False]) == method.weights([False]) == {"policy": 1.0, "sft": 0.25}


def test_prompts_whose_grading_failed_are_in_neither_branch() -> None:
    # b has no group of two any more, so the step has two prompts: one for each branch.
    collected = HPT().collect(draw_of(SCORES | {("", "b"): (None, 1.0)}))
    assert collected.weights == {"policy": 0.5, "sft": 0.5}
    assert collected.stats["dropped_groups"] == 1
    with pytest.raises(TooManyGraderErrors, match="step 0"):
        HPT().collect(draw_of(dict.fromkeys(SCORES, (None, 1.0))))


def test_the_gate_reads_scores_not_rewards() -> None:
    late = replace(graded(prompt("a"), (1.0, 0.0, None)), rewards=(-1.0, -1.0, None))
    assert mean_score(late) == 0.5


def test_terms() -> None:
    terms = terms_of(run_of(aggregation="seq-mean-token-mean"))
    assert (terms["policy"].aggregation, terms["sft"].aggregation) == ("seq-mean-token-mean", "token-mean")
    assert terms["policy"].pool != terms["sft"].pool
    outputs = [empty_output(term) for term in terms.values()]
    names = [name for output in outputs for name in (*output.losses, *output.means, *output.maxima)]
    assert len(set(names)) == len(names)
    assert {"logprob_gap", "logprob_gap_max", "entropy", "sft_nll"} <= set(names)


@pytest.mark.parametrize(
    ("settings", "batch", "objective", "reason"),
    [
        ({"gate": -0.1}, {}, {}, r"method.gate must lie in \[0, 1\), got -0.1"),
        ({"gate": 1}, {}, {}, r"method.gate must lie in \[0, 1\), got 1"),
        ({"sft_coefficient": 0}, {}, {}, "method.sft_coefficient must be > 0"),
        ({}, {"sampling_attempts": 2}, {}, "batch.sampling_attempts: dynamic sampling would replace"),
    ],
)
def test_refusals(settings: Any, batch: Any, objective: Any, reason: str) -> None:
    assert_refused(lambda: run_of(settings=settings, **objective), batch=batch, reason=reason)


def test_it_needs_demonstrations() -> None:
    method_of(run_of())
    with pytest.raises(ValueError, match="needs every prompt's own demonstration"):
        method_of(tiny_run(Path("model"), method="hpt"))
