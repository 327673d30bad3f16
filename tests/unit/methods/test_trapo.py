"""TRAPO: which prompts are helped in which round, the groups, and which tokens are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.losses.terms import empty_output
from megatron_chord.methods.table import method_of
from megatron_chord.methods.trapo import Answer, answers_of, is_below, sample_of, samples_of
from megatron_chord.records import GradedRollouts, Rollout
from megatron_chord.sampling.context import DrawnPrompt
from megatron_chord.sampling.rounds import TooManyGraderErrors
from tests.support.scripted import ScriptedContext, graded, prompt
from tests.support.tiny import terms_of, tiny_run
from tests.unit.methods.guided import PROBABILITIES, assert_refused, push_on_target, stats_of, tokens_of

DEMONSTRATION = tuple(range(90, 98))
SETTINGS: dict[str, Any] = {"counts": (2, 2, 1), "shares": (0.0, 0.5, 1.0), "thresholds": (0.5, 0.75)}


class Context(ScriptedContext):
    """A demonstration has the reward 1."""

    def graded_demonstrations(self, drawn: list[DrawnPrompt]) -> list[GradedRollouts]:
        self.asked.append(("demonstration", drawn, 1))
        whole = Rollout(token_ids=DEMONSTRATION, logprobs=(), finish_reason="stop", weight_version=0)
        return [replace(graded(item.prompt, (1.0,)), rollouts=(whole,)) for item in drawn]

    def rollouts(self, drawn: Any, *, num_rollouts: int, **named: Any) -> list[GradedRollouts]:
        found = super().rollouts(drawn, num_rollouts=num_rollouts, **named)
        self.prefixes.append(tuple(item.prefix for item in found))
        return found

    @property
    def prefixes(self) -> list[tuple[tuple[int, ...], ...]]:
        return self.__dict__.setdefault("_prefixes", [])


def run_of(*, settings: dict[str, Any] | None = None, rollouts: int = 5, **changes: Any) -> RunConfig:
    run = tiny_run(Path("model"), method="trapo", settings={**SETTINGS, **(settings or {})}, **changes)
    return replace(
        run,
        data=replace(run.data, aligned=True),
        batch=replace(run.batch, rollouts=rollouts, prompts=3, demonstrations=0),
    )


SCORES: dict[tuple[str, str], Any] = {
    ("", "a"): (0.0, 0.0),
    ("", "b"): (0.0, 1.0),
    ("", "c"): (1.0, 1.0),
    ("round1", "a"): (0.0, 1.0),
    ("round1", "b"): (1.0, 1.0),
    ("round1", "c"): (1.0, 1.0),
    ("round2", "a"): (0.0,),
    ("round2", "b"): (1.0,),
    ("round2", "c"): (0.0,),
}


def collect(scores: dict[tuple[str, str], Any], run: RunConfig) -> tuple[Any, Any]:
    context: Any = Context(run=run, scores=scores, demonstrations=dict.fromkeys("abc", DEMONSTRATION))
    return context, method_of(run).collect(context)


def test_hard_prompts_get_more_of_their_demonstration() -> None:
    # Before round 1: a has 0 of 2 (below 0.5), b exactly 0.5, c 1. Before round 2: a has 1/4, b exactly 0.75, c 1.
    context, collected = collect(SCORES, run_of(advantage="group_mean"))
    asked = [(attempt, [item.prompt.id for item in drawn], n) for attempt, drawn, n in context.asked]
    assert asked == [
        ("", ["a", "b", "c"], 2),
        ("round1", ["a", "b", "c"], 2),
        ("demonstration", ["a"], 1),
        ("round2", ["b", "c"], 1),
    ]
    assert context.prefixes == [((), (), ()), (DEMONSTRATION[:4], (), ()), ((), ())]
    assert collected.weights == {"policy": 1.0, "sft": 1.0}
    assert collected.stats["guided_answers"] == pytest.approx(3 / 15)
    assert collected.stats["guided_prompts"] == pytest.approx(1 / 3)
    assert collected.stats["prefix_share"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert collected.stats["guided_reward_mean"] == pytest.approx(2 / 3)
    assert collected.stats["reward_mean"] == 0.5

    of_a = collected.samples[:5]
    # All five answers of a are one group: rewards 0 0 0 1 1, mean 0.4. The second helped answer trains no prefix.
    found = [
        [(p.term, p.positions.tolist(), p.constants.get("advantage")) for p in sample.parts]
        for sample in of_a
    ]
    assert found == [
        [("policy", [2, 3], pytest.approx(-0.4))],
        [("policy", [2, 3], pytest.approx(-0.4))],
        [("sft", [2, 3, 4, 5], None), ("policy", [6, 7], pytest.approx(-0.4))],
        [("policy", [6, 7], pytest.approx(0.6))],
        [("sft", [*range(2, 10)], None)],
    ]
    assert of_a[2].token_ids.tolist() == [5, 6, 90, 91, 92, 93, 20, 21]
    assert of_a[4].token_ids.tolist() == [5, 6, *DEMONSTRATION]
    assert of_a[2].parts[1].constants["rollout_logprob"].tolist() == [-0.5, -1.0]


def test_failed_gradings_count_nowhere() -> None:
    assert is_below([graded(prompt("a"), (None, 0.0))], 0.5)
    assert not is_below([graded(prompt("a"), (None, None))], 0.5)
    assert not is_below([graded(prompt("a"), (None, 0.0)), graded(prompt("a"), (1.0,))], 0.5)
    # The first answer that has a grade trains the prefix.
    first, second = answers_of([graded(prompt("a"), (None, 0.0, 1.0), prefix=(90,))])
    assert (first.is_prefix_trained, second.is_prefix_trained) == (True, False)
    with pytest.raises(TooManyGraderErrors, match="step 0"):
        collect({key: tuple(None for _ in value) for key, value in SCORES.items()}, run_of())


def test_equal_groups_and_truncated_answers_train_their_prefix_alone() -> None:
    rollout = Rollout(token_ids=(20,), logprobs=(-1.0,), finish_reason="length", weight_version=0)
    helped = Answer(prompt=prompt("a"), prefix=(90, 91), rollout=rollout, reward=0.0, is_prefix_trained=True)
    plain = replace(
        helped, prefix=(), is_prefix_trained=False, rollout=replace(rollout, finish_reason="stop")
    )

    def terms(**settings: Any) -> list[list[str]]:
        found = samples_of([[helped, plain]], ObjectiveConfig(**settings))
        return [[part.term for part in sample.parts] for sample in found]

    assert terms() == [["sft", "policy"], ["policy"]]
    assert terms(equal_groups="drop") == [["sft"]]
    assert terms(truncated="mask") == [["sft"], ["policy"]]
    routed = replace(helped, rollout=replace(rollout, routes=np.arange(4, dtype=np.uint8).reshape(4, 1, 1)))
    sample = sample_of(routed, 0.0, trains_rollout=False)
    assert sample.token_ids.tolist() == [5, 6, 90, 91], "an untrained continuation costs no time"
    assert sample.routes is not None
    assert sample.routes.ravel().tolist() == [0, 1, 2, 3]
    assert sample_of(plain, 0.0, trains_rollout=False).parts == ()


def test_a_helped_answer_keeps_the_experts_that_the_engine_chose() -> None:
    routes = np.zeros((4, 1, 1), np.uint8)
    rollout = Rollout(
        token_ids=(20,), logprobs=(-1.0,), finish_reason="stop", weight_version=0, routes=routes
    )
    helped = Answer(prompt=prompt("a"), prefix=(90,), rollout=rollout, reward=0.0, is_prefix_trained=True)
    found = sample_of(helped, 0.0, trains_rollout=True).routes
    assert found is not None
    assert np.shares_memory(found, routes)
    assert len(found) == len(routes)
    whole = replace(helped, rollout=None)
    assert sample_of(whole, 0.0, trains_rollout=False).routes is None


def test_the_pull_of_a_prefix_token_is_limited() -> None:
    """d loss / d logit is min(1, p / 0.1) (1 - p): that of SFT from p = 0.1 on, and that of 10 DFT below."""
    term = terms_of(run_of())["sft"]
    for p in PROBABILITIES:
        found = push_on_target(p, lambda stats: term.loss(stats, tokens_of((1,))))
        assert found == pytest.approx((1 if p >= 0.1 else p / 0.1) * (1 - p), rel=1e-9, abs=1e-12)
    stats = stats_of([0.05, 0.5])
    assert term.loss(stats, tokens_of((2,))).loss.tolist() == pytest.approx(
        [-0.5 * torch.tensor(0.05).log().item(), -torch.tensor(0.5).log().item()]
    )


def test_terms() -> None:
    terms = terms_of(run_of(aggregation="seq-mean-token-sum-norm"))
    assert {term.pool for term in terms.values()} == {"policy"}
    assert {(term.aggregation, term.aggregation_length) for term in terms.values()} == {
        ("seq-mean-token-sum-norm", 16)
    }
    assert "token_weight" in empty_output(terms["sft"]).means


@pytest.mark.parametrize(
    ("settings", "batch", "reason"),
    [
        ({"counts": (2, 2)}, {}, "a number in method.counts and method.shares for each round"),
        ({"counts": (5,), "shares": (0.0,), "thresholds": ()}, {}, "one round: without help it is GRPO"),
        ({"counts": (1, 3, 1)}, {}, "at least 2 answers in the first round"),
        ({"shares": (0.5, 0.5, 1.0)}, {}, "method.shares must be 0 and then lie in"),
        ({"shares": (0.0, 1.0, 1.0)}, {}, "method.shares 1 needs a round of one answer"),
        ({"threshold": 0.0}, {}, "method.threshold must lie in"),
        ({"sft_coefficient": 0.0}, {}, "method.sft_coefficient must be > 0"),
        ({"counts": (3, 2, 1)}, {}, r"method.counts \[3, 2, 1\] adds up to 6, but batch.rollouts is 5"),
        ({}, {"sampling_attempts": 2}, "dynamic sampling would replace the prompts"),
    ],
)
def test_refusals(settings: Any, batch: Any, reason: str) -> None:
    assert_refused(lambda: run_of(settings=settings), batch=batch, reason=reason)


def test_it_needs_demonstrations() -> None:
    run = run_of()
    assert method_of(run).max_sampling_rounds(run.batch) == 3
    with pytest.raises(ValueError, match="needs every prompt's own demonstration"):
        method_of(replace(run, data=replace(run.data, aligned=False)))
