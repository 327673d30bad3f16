"""SRFT: both entropy-weighted losses, the signs of the rollouts, and the settings that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_chord.config import CorrectionConfig, KLConfig
from megatron_chord.config_methods import SRFTConfig
from megatron_chord.losses.aggregate import SCALE, with_scales
from megatron_chord.methods.srft import SRFT, UNUSED, imitation_loss, signed_loss
from megatron_chord.methods.table import method_of
from tests.support.tiny import terms_of
from tests.unit.methods.guided import (
    BROKEN,
    PROBABILITIES,
    RIGHT,
    WRONG,
    answer,
    constants,
    entropy_of,
    guided_run,
    push_on_target,
    scripted_draw,
    stats_of,
    tokens_of,
)

MIXED = [answer(RIGHT), answer(WRONG), answer(WRONG, finish="length")]
LN2 = math.log(2)


def test_rollouts_have_signs_and_demonstrations_joint_advantages() -> None:
    run = guided_run("srft", prompts=2, advantage="group_mean")
    collected = SRFT().collect(scripted_draw(run, [MIXED, [answer(RIGHT)] * 3], [RIGHT, WRONG]))
    assert constants(collected.samples, "policy", "sign") == {0: [1, -1, -1], 1: [1, 1, 1]}
    assert constants(collected.samples, "demonstration", "advantage") == {0: [0.5], 1: [-0.75]}
    assert set(collected.samples[0].parts[0].constants) == {"sign", "rollout_logprob"}
    assert collected.weights == {"policy": 1.0, "demonstration": 1.0}
    assert collected.stats["demonstration_reward"] == 0.5


def test_the_threshold_of_right_rollouts() -> None:
    run = guided_run("srft", prompts=1)
    context = scripted_draw(run, [MIXED], [RIGHT])
    collected = SRFT(settings=SRFTConfig(positive_reward=1.0)).collect(context)
    assert constants(collected.samples, "policy", "sign") == {0: [-1, -1, -1]}


def test_cut_off_rollouts_equal_groups_and_failed_gradings() -> None:
    run = guided_run("srft", prompts=3, truncated="mask", equal_groups="drop")
    answers = [MIXED, [answer(RIGHT)] * 3, [answer(RIGHT), answer(WRONG), answer(BROKEN)]]
    collected = SRFT().collect(scripted_draw(run, answers, [RIGHT, RIGHT, BROKEN]))
    assert constants(collected.samples, "policy", "sign") == {0: [1, -1], 2: [1, -1]}
    assert list(constants(collected.samples, "demonstration", "advantage")) == [0]
    assert collected.stats["demonstration_errors"] == 1


def test_each_expectation_is_a_mean_of_its_own() -> None:
    run = guided_run("srft")
    samples = SRFT().collect(scripted_draw(run, [MIXED], [RIGHT])).samples
    scales = [
        part.constants[SCALE] for sample in with_scales(samples, terms_of(run)) for part in sample.parts
    ]
    # 3 rollouts of 2 tokens; a demonstration of 3.
    assert scales == [1 / 6] * 3 + [1 / 3]


def test_demonstration_tokens() -> None:
    # Sequences of 2 and 1 tokens; mean entropies ln 2 and ln 4, so w = 0.5 / 2 and 0.5 / 4.
    stats = stats_of([0.5, 0.25, 0.5], [0.5 * LN2, 1.5 * LN2, 2 * LN2])
    output = imitation_loss(stats, tokens_of((2, 1), advantage=[2.0, 2.0, -1.0]), coefficient=0.5)
    sft, rl = [0.25 * LN2, 0.5 * LN2, 0.125 * LN2], [-1.0, -0.5, 0.5]
    assert output.losses["demonstration_sft_loss"].tolist() == pytest.approx(sft)
    assert output.losses["demonstration_rl_loss"].tolist() == pytest.approx(rl)
    assert output.loss.tolist() == pytest.approx([a + b for a, b in zip(sft, rl, strict=True)])
    assert output.means["demonstration_weight"].tolist() == pytest.approx([0.25, 0.25, 0.125])
    output.loss.sum().backward()
    assert stats.logprobs.grad is not None
    # d(-w log p - p A)/d log p = -w - p A
    assert stats.logprobs.grad.tolist() == pytest.approx([-1.25, -0.75, 0.375])
    assert stats.entropy.grad is None


def test_rollout_tokens() -> None:
    # Mean entropies ln 2 and ln 4: w = 0.1 x 2 for the right sequence; the wrong one's is not used.
    stats = stats_of([0.5, 0.25, 0.5], [0.5 * LN2, 1.5 * LN2, 2 * LN2])
    tokens = tokens_of((2, 1), sign=[1.0, 1.0, -1.0], rollout_logprob=[-LN2, -LN2, -3 * LN2])
    output = signed_loss(stats, tokens, coefficient=0.1)
    loss = [0.2 * LN2, 0.4 * LN2, -LN2]
    assert output.loss.tolist() == pytest.approx(loss)
    assert output.losses["policy_loss"].tolist() == pytest.approx(loss)
    assert output.means["right_fraction"].tolist() == [1, 1, 0]
    assert output.means["right_weight"].tolist() == pytest.approx([0.2, 0.2, 0.4])
    assert output.means["logprob_gap"].tolist() == pytest.approx([0, LN2, 2 * LN2])
    assert output.maxima["logprob_gap_max"].tolist() == pytest.approx([0, LN2, 2 * LN2])
    output.loss.sum().backward()
    assert stats.logprobs.grad is not None
    assert stats.logprobs.grad.tolist() == pytest.approx([-0.2, -0.2, 1.0])
    assert stats.entropy.grad is None
    assert not any(value.requires_grad for value in [*output.losses.values(), *output.means.values()])


@pytest.mark.parametrize("p", PROBABILITIES)
def test_gradient_oracle_of_imitation(p: float) -> None:
    tokens = tokens_of(advantage=0.0)
    push = push_on_target(p, lambda stats: imitation_loss(stats, tokens, coefficient=0.5))
    assert push == pytest.approx(0.5 * math.exp(-entropy_of(p)) * (1 - p), rel=1e-9)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_gradient_oracle_of_a_demonstration(p: float, advantage: float) -> None:
    tokens = tokens_of(advantage=advantage)
    push = push_on_target(p, lambda stats: imitation_loss(stats, tokens, coefficient=0.5))
    assert push == pytest.approx((0.5 * math.exp(-entropy_of(p)) + p * advantage) * (1 - p), rel=1e-9)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_oracle_of_a_rollout(p: float, sign: float) -> None:
    tokens = tokens_of(sign=sign, rollout_logprob=-1.0)
    push = push_on_target(p, lambda stats: signed_loss(stats, tokens, coefficient=0.1))
    weight = 0.1 * math.exp(entropy_of(p)) if sign > 0 else -1.0
    assert push == pytest.approx(weight * (1 - p), rel=1e-9)


def test_settings_reach_the_losses() -> None:
    run = guided_run("srft", settings={"sft_coefficient": 2, "rl_coefficient": 3.0})
    terms = terms_of(run)
    assert terms["demonstration"].loss(
        stats_of([0.5]), tokens_of(advantage=0.0)
    ).loss.item() == pytest.approx(2 * LN2)
    tokens = tokens_of(sign=1.0, rollout_logprob=0.0)
    assert terms["policy"].loss(stats_of([0.5]), tokens).loss.item() == pytest.approx(3 * LN2)


REFUSED: dict[str, dict[str, Any]] = {
    "surrogate": {"surrogate": "unclipped"},
    "clip_low": {"clip_low": 0.1},
    "clip_high": {"clip_high": 0.28},
    "dual_clip": {"dual_clip": 3.0},
    "ratio_from": {"ratio_from": "recomputed"},
    "kl": {"kl": KLConfig()},
    "correction": {"correction": CorrectionConfig(), "ratio_from": "current"},
}


def test_every_refused_setting_is_tried() -> None:
    assert set(REFUSED) == set(UNUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_without_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"objective\.\w+: method srft .*leave it out"):
        method_of(guided_run("srft", **REFUSED[name]))


def test_an_entropy_bonus_is_taken_over_all_tokens() -> None:
    run = guided_run("srft", entropy_bonus=0.5, entropy_bonus_on="all")
    assert {name: term.entropy_bonus for name, term in terms_of(run).items()} == {
        "policy": 0.5,
        "demonstration": 0.5,
    }
    with pytest.raises(ValueError, match=r"set objective\.entropy_bonus_on: all"):
        method_of(guided_run("srft", entropy_bonus=0.5))


@pytest.mark.parametrize("name", ["sft_coefficient", "rl_coefficient"])
def test_negative_coefficients_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.{name} must be >= 0"):
        method_of(guided_run("srft", settings={name: -1.0}))
