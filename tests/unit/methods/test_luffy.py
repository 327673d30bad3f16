"""LUFFY's advantages over rollouts and demonstration, and its shaped ratio, agree with hand arithmetic and
gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_chord.config_methods import SimpleWeight
from megatron_chord.losses.aggregate import SCALE, with_scales
from megatron_chord.losses.sft import sft_loss
from megatron_chord.losses.terms import empty_output
from megatron_chord.methods.luffy import Luffy, shaped_loss
from megatron_chord.methods.table import method_of
from tests.support.tiny import terms_of
from tests.unit.methods.guided import (
    BROKEN,
    PROBABILITIES,
    RIGHT,
    WRONG,
    answer,
    constants,
    guided_run,
    push_on_target,
    scripted_draw,
    stats_of,
    tokens_of,
)

MIXED = [answer(RIGHT), answer(WRONG), answer(WRONG)]
ALL_WRONG = [answer(WRONG)] * 3
ALL_RIGHT = [answer(RIGHT)] * 3


def test_advantages_are_over_rollouts_and_demonstration_together() -> None:
    run = guided_run("luffy", prompts=2, advantage="group_mean")
    context = scripted_draw(run, [MIXED, ALL_WRONG], [RIGHT, RIGHT])
    collected = Luffy().collect(context)
    # Rewards 1 0 0 | 1: mean 1/2. Rewards 0 0 0 | 1: mean 1/4.
    assert constants(collected.samples, "policy", "advantage") == {0: [0.5, -0.5, -0.5], 1: [-0.25] * 3}
    assert constants(collected.samples, "demonstration", "advantage") == {0: [0.5], 1: [0.75]}
    assert collected.weights == {"policy": 1.0, "demonstration": 1.0}
    assert collected.stats["reward_mean"] == pytest.approx(1 / 6)
    assert collected.stats["demonstration_reward"] == 1.0
    assert collected.stats["demonstration_advantage"] == 0.625
    assert collected.stats["demonstration_errors"] == 0


def test_advantages_by_the_joint_standard_deviation() -> None:
    run = guided_run("luffy", advantage_eps=1e-12)
    collected = Luffy().collect(scripted_draw(run, [ALL_WRONG], [RIGHT]))
    # Rewards 0 0 0 | 1: squared deviations 3/16 + 9/16, unbiased variance 1/4, standard deviation 1/2.
    assert constants(collected.samples, "policy", "advantage")[0] == pytest.approx([-0.5] * 3)
    assert constants(collected.samples, "demonstration", "advantage")[0] == pytest.approx([1.5])


def test_the_answer_is_trained_and_the_prompt_is_not() -> None:
    run = guided_run("luffy")
    samples = Luffy().collect(scripted_draw(run, [MIXED], [RIGHT])).samples
    assert samples[-1].token_ids.tolist() == [100, 3, 30, 31, RIGHT]
    assert samples[-1].parts[0].positions.tolist() == [2, 3, 4]
    assert set(samples[-1].parts[0].constants) == {"advantage"}
    assert set(samples[0].parts[0].constants) == {"advantage", "rollout_logprob"}


def test_one_denominator_for_rollouts_and_demonstrations() -> None:
    run = guided_run("luffy")
    samples = Luffy().collect(scripted_draw(run, [MIXED], [RIGHT])).samples
    scaled = with_scales(samples, terms_of(run))
    # 3 rollouts of 2 tokens and a demonstration of 3.
    assert [part.constants[SCALE] for sample in scaled for part in sample.parts] == [1 / 9] * 4


def test_groups_of_equal_rewards_are_judged_with_their_demonstration() -> None:
    run = guided_run("luffy", prompts=2, advantage="group_mean", equal_groups="drop")
    collected = Luffy().collect(scripted_draw(run, [ALL_WRONG, ALL_RIGHT], [RIGHT, RIGHT]))
    assert constants(collected.samples, "policy", "advantage") == {0: [-0.25] * 3}
    assert constants(collected.samples, "demonstration", "advantage") == {0: [0.75]}


def test_rollouts_that_were_cut_off_are_left_out_but_count_in_the_group() -> None:
    run = guided_run("luffy", advantage="group_mean", truncated="mask")
    answers = [answer(RIGHT), answer(WRONG), answer(WRONG, finish="length")]
    collected = Luffy().collect(scripted_draw(run, [answers], [RIGHT]))
    assert constants(collected.samples, "policy", "advantage") == {0: [0.5, -0.5]}
    assert constants(collected.samples, "demonstration", "advantage") == {0: [0.5]}


def test_a_group_trains_without_a_demonstration_that_could_not_be_graded() -> None:
    run = guided_run("luffy", prompts=2, advantage="group_mean")
    collected = Luffy().collect(scripted_draw(run, [MIXED, MIXED], [BROKEN, RIGHT]))
    policy = constants(collected.samples, "policy", "advantage")
    assert policy[0] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert policy[1] == [0.5, -0.5, -0.5]
    assert constants(collected.samples, "demonstration", "advantage") == {1: [0.5]}
    assert collected.stats["demonstration_errors"] == 1


def test_without_a_graded_demonstration_the_rollouts_train_alone() -> None:
    run = guided_run("luffy")
    collected = Luffy().collect(scripted_draw(run, [MIXED], [BROKEN]))
    assert {part.term for sample in collected.samples for part in sample.parts} == {"policy"}
    assert collected.stats["demonstration_errors"] == 1
    assert "demonstration_reward" not in collected.stats


def test_dynamic_sampling_judges_the_rollouts_alone() -> None:
    run = guided_run("luffy", advantage="group_mean")
    run = replace(run, batch=replace(run.batch, sampling_attempts=2))
    order = scripted_draw(run, [MIXED] * 2, [RIGHT] * 2).sources.prompt_cursor.take(2)[0]
    answers = [ALL_WRONG if index == order[0] else MIXED for index in range(2)]
    collected = Luffy().collect(scripted_draw(run, answers, [RIGHT] * 2))
    # Without the demonstration the first prompt's group is 0 0 0 | 1.
    assert list(constants(collected.samples, "policy", "advantage")) == [order[1]]
    assert list(constants(collected.samples, "demonstration", "advantage")) == [order[1]]
    assert collected.stats["sampling_rounds"] == 2


@pytest.mark.parametrize(
    ("gamma", "p", "advantage", "loss"),
    [
        # f(0.1) = 1/2, f(0.9) = 9/10 at gamma = 0.1.
        (0.1, 0.1, 1.0, -0.5),
        (0.1, 0.9, 0.5, -0.45),
        (0.1, 0.1, -2.0, 1.0),
        (0.5, 0.5, 1.0, -0.5),
        (None, 0.25, 1.0, -0.25),
    ],
)
def test_one_token(gamma: float | None, p: float, advantage: float, loss: float) -> None:
    output = shaped_loss(stats_of([p]), tokens_of(advantage=advantage), gamma=gamma)
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    assert output.losses["demonstration_loss"].item() == pytest.approx(loss, rel=1e-12)
    assert output.means["demonstration_ratio"].item() == pytest.approx(-loss / advantage, rel=1e-12)
    assert output.means["demonstration_p"].item() == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("gamma", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_gradient_oracle(p: float, gamma: float, advantage: float) -> None:
    push = push_on_target(p, lambda stats: shaped_loss(stats, tokens_of(advantage=advantage), gamma=gamma))
    assert push == pytest.approx(advantage * gamma * p * (1 - p) / (p + gamma) ** 2, rel=1e-9)


def test_shaping_pushes_most_at_one_twelfth() -> None:
    pushes = {
        p: push_on_target(p, lambda stats: shaped_loss(stats, tokens_of(advantage=1.0), gamma=0.1))
        for p in (0.08, 1 / 12, 0.09)
    }
    assert pushes[1 / 12] == max(pushes.values())


@pytest.mark.parametrize("p", PROBABILITIES)
def test_without_shaping_and_with_advantage_1_the_gradient_is_that_of_dft(p: float) -> None:
    shaped = push_on_target(p, lambda stats: shaped_loss(stats, tokens_of(advantage=1.0), gamma=None))
    dft = push_on_target(p, lambda stats: sft_loss(stats, tokens_of(), weight=SimpleWeight(kind="p")))
    assert shaped == pytest.approx(dft, rel=1e-12) == pytest.approx(p * (1 - p), rel=1e-9)


def test_the_advantage_has_no_gradient_and_the_metrics_neither() -> None:
    stats = stats_of([0.3, 0.6])
    advantage = torch.tensor([0.5, -1.0], dtype=torch.float64)
    tokens = replace(tokens_of((2,)), columns={"advantage": advantage})
    output = shaped_loss(stats, tokens, gamma=0.1)
    output.loss.sum().backward()
    assert stats.logprobs.grad is not None
    # df/d log p = gamma p / (p + gamma)^2: 3/16 and 6/49.
    assert stats.logprobs.grad.tolist() == pytest.approx([-0.5 * 3 / 16, 6 / 49], rel=1e-12)
    assert stats.entropy.grad is None
    assert not any(value.requires_grad for value in [*output.losses.values(), *output.means.values()])


@pytest.mark.parametrize("gamma", [0.1, None])
def test_certain_and_impossible_tokens_are_finite(gamma: float | None) -> None:
    logprobs = torch.tensor([0.0, -1e4], requires_grad=True)
    stats = stats_of([1.0, 1.0])._replace(logprobs=logprobs)
    output = shaped_loss(stats, tokens_of((2,), advantage=1.0), gamma=gamma)
    output.loss.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(output.loss).all()
    assert torch.isfinite(logprobs.grad).all()
    assert logprobs.grad[1] == 0


def test_settings_reach_the_loss() -> None:
    for settings, ratio in (({}, 0.5), ({"gamma": 0.3}, 0.25), ({"shaping": False}, 0.1)):
        run = guided_run("luffy", settings=settings)
        term = terms_of(run)["demonstration"]
        assert term.loss(stats_of([0.1]), tokens_of(advantage=1.0)).loss.item() == pytest.approx(-ratio)


@pytest.mark.parametrize("name", ["luffy", "rl_plus", "srft"])
def test_names_of_metrics_are_unique_and_the_log_prob_check_finds_its_own(name: str) -> None:
    run = guided_run(name)
    outputs = [empty_output(term) for term in terms_of(run).values()]
    names = [key for output in outputs for key in (*output.losses, *output.means, *output.maxima)]
    assert len(names) == len(set(names))
    assert {"logprob_gap", "logprob_gap_max", "entropy", "policy_loss", "demonstration_p"} <= set(names)


@pytest.mark.parametrize("name", ["luffy", "rl_plus", "srft"])
@pytest.mark.parametrize(
    ("block", "change", "message"),
    [
        ("data", {"aligned": False}, "set data.aligned: true"),
        ("batch", {"demonstrations": 5}, "uses only the demonstrations of its prompts"),
    ],
)
def test_a_run_without_demonstrations_or_with_others_is_refused(
    name: str, block: str, change: dict[str, Any], message: str
) -> None:
    run = guided_run(name)
    method_of(run)
    run = replace(run, **{block: replace(getattr(run, block), **change)})
    with pytest.raises(ValueError, match=message):
        method_of(run)


@pytest.mark.parametrize("gamma", [0, -0.1])
def test_a_gamma_that_shapes_nothing_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"method\.gamma must be > 0"):
        method_of(guided_run("luffy", settings={"gamma": gamma}))
