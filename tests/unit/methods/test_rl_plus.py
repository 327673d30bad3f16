"""RL-PLUS: the mixture ratio and the exploration advantage agree with hand arithmetic and gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_chord.losses.aggregate import SCALE, with_scales
from megatron_chord.methods.rl_plus import RLPlus, mixture_loss
from megatron_chord.methods.table import method_of
from tests.support.tiny import terms_of
from tests.unit.methods.guided import (
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


def test_its_groups_are_those_of_luffy() -> None:
    run = guided_run("rl_plus", advantage="group_mean")
    answers = [answer(RIGHT), answer(WRONG), answer(WRONG)]
    collected = RLPlus().collect(scripted_draw(run, [answers], [RIGHT]))
    assert constants(collected.samples, "policy", "advantage") == {0: [0.5, -0.5, -0.5]}
    assert constants(collected.samples, "demonstration", "advantage") == {0: [0.5]}
    assert collected.weights == {"policy": 1.0, "demonstration": 1.0}
    scaled = with_scales(collected.samples, terms_of(run))
    assert [part.constants[SCALE] for sample in scaled for part in sample.parts] == [1 / 9] * 4


@pytest.mark.parametrize(
    ("p", "old", "gamma", "ratio", "focus"),
    [
        # 2 x 0.75 / (1.5 x 1/3 + 0.5) = 1.5; (1 - 0.75)^0.5 = 1/2.
        (0.75, 1 / 3, 0.5, 1.5, 0.5),
        (0.75, 1 / 3, 2.0, 1.5, 0.0625),
        (0.75, 1 / 3, 0.0, 1.5, 1.0),
        # At p_old = 0 the ratio is at most 4, at p_old = 1 it is p.
        (0.36, 0.0, 0.5, 1.44, 0.8),
        (0.36, 1.0, 0.5, 0.36, 0.8),
    ],
)
def test_one_token(p: float, old: float, gamma: float, ratio: float, focus: float) -> None:
    tokens = tokens_of(advantage=-0.5, old_logprob=math.log(old) if old else -math.inf)
    output = mixture_loss(stats_of([p]), tokens, gamma=gamma, ratio_from="recomputed")
    assert output.loss.item() == pytest.approx(ratio * focus * 0.5, rel=1e-12)
    assert output.losses["demonstration_loss"].item() == output.loss.item()
    means = {name: values.item() for name, values in output.means.items()}
    assert means == pytest.approx(
        {"demonstration_p": p, "demonstration_ratio": ratio, "demonstration_focus": focus}
    )


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("ratio_from", ["rollout", "current", "recomputed"])
def test_gradient_oracle(p: float, gamma: float, ratio_from: str) -> None:
    old = 0.3 if ratio_from == "recomputed" else p
    tokens = tokens_of(advantage=1.0, old_logprob=math.log(0.3))
    push = push_on_target(p, lambda stats: mixture_loss(stats, tokens, gamma=gamma, ratio_from=ratio_from))
    assert push == pytest.approx(2 * p * (1 - p) ** (1 + gamma) / (1.5 * old + 0.5), rel=1e-9)


def test_the_focal_factor_and_the_old_policy_have_no_gradient() -> None:
    stats = stats_of([0.75])
    old = torch.tensor([1 / 3], dtype=torch.float64).log().requires_grad_()
    tokens = replace(
        tokens_of(), columns={"advantage": torch.ones(1, dtype=torch.float64), "old_logprob": old.detach()}
    )
    output = mixture_loss(stats, tokens, gamma=0.5, ratio_from="recomputed")
    output.loss.sum().backward()
    assert stats.logprobs.grad is not None
    # d(r_m)/d log p = r_m: only the ratio has a gradient.
    assert stats.logprobs.grad.item() == pytest.approx(-1.5 * 0.5, rel=1e-12)
    assert stats.entropy.grad is None
    assert not any(value.requires_grad for value in [*output.losses.values(), *output.means.values()])


def test_certain_and_impossible_tokens_are_finite() -> None:
    logprobs = torch.tensor([0.0, -1e4], requires_grad=True)
    stats = stats_of([1.0, 1.0])._replace(logprobs=logprobs)
    output = mixture_loss(stats, tokens_of((2,), advantage=1.0), gamma=0.5, ratio_from="rollout")
    output.loss.sum().backward()
    assert output.loss.tolist() == [0.0, 0.0]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio_from", "columns"), [("rollout", set()), ("current", set()), ("recomputed", {"old_logprob"})]
)
def test_the_old_policy_is_asked_for_only_where_the_ratio_is_recomputed(
    ratio_from: str, columns: set[str]
) -> None:
    run = guided_run("rl_plus", ratio_from=ratio_from)
    assert terms_of(run)["demonstration"].scored == columns


def test_settings_reach_the_loss() -> None:
    run = guided_run("rl_plus", settings={"gamma": 2})
    loss = terms_of(run)["demonstration"].loss(stats_of([0.5]), tokens_of(advantage=1.0)).loss
    assert loss.item() == pytest.approx(-(1 / 1.25) * 0.25)


def test_a_negative_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.gamma must be >= 0"):
        method_of(guided_run("rl_plus", settings={"gamma": -0.5}))
