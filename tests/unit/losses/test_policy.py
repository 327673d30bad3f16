"""Advantages, all surrogates, importance weights and KL estimators, compared with numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_chord.config import CorrectionConfig, KLConfig, ObjectiveConfig
from megatron_chord.losses.policy import (
    correction_weights,
    group_advantages,
    kl_penalty,
    policy_loss,
    surrogate,
)
from megatron_chord.losses.terms import TermTokens, TokenStats
from tests.unit.methods.guided import stats_of, tokens_of

LN2 = math.log(2)
DAPO = ObjectiveConfig(clip_low=0.2, clip_high=0.28)


def logs(values: list[float]) -> list[float]:
    return [math.log(value) for value in values]


class Result(NamedTuple):
    loss: list[float]
    grad: list[float]
    clipped: list[bool]
    dual_clipped: list[bool]


def run_surrogate(
    ratios: list[float], tokens: TermTokens, objective: ObjectiveConfig, *, p: float = 0.25
) -> Result:
    """Run the surrogate on tokens whose probability is ``p`` now and was p / ratio before."""
    logprobs = torch.full((len(ratios),), math.log(p), dtype=torch.float64, requires_grad=True)
    old = (logprobs - torch.tensor(logs(ratios), dtype=torch.float64)).requires_grad_()
    old.retain_grad()
    out = surrogate(logprobs, old, tokens, objective)
    out.loss.sum().backward()
    assert logprobs.grad is not None
    assert old.grad is None
    assert out.clipped.dtype == out.dual_clipped.dtype == torch.bool
    return Result(out.loss.tolist(), logprobs.grad.tolist(), out.clipped.tolist(), out.dual_clipped.tolist())


def test_advantages_with_the_unbiased_standard_deviation() -> None:
    # Mean 0.25; squared deviations 0.5625 + 3 x 0.0625 = 0.75; unbiased variance 0.75 / 3 = 0.25, std 0.5.
    # With eps = 0.5 the scale is 1.0, without it 0.5.
    rewards = [[1.0, 0.0, 0.0, 0.0]]
    assert group_advantages(rewards, kind="group_std", eps=0.5) == [(0.75, -0.25, -0.25, -0.25)]
    assert group_advantages(rewards, kind="group_std", eps=0.0) == [(1.5, -0.5, -0.5, -0.5)]


def test_advantages_without_standard_deviation() -> None:
    # The mean is 0.5. eps has no effect.
    assert group_advantages([[2.0, 0.0, 0.0, 0.0]], kind="group_mean", eps=7.0) == [(1.5, -0.5, -0.5, -0.5)]


def test_advantages_with_the_standard_deviation_of_the_step() -> None:
    # Nine rewards of mean 1, squared deviations 4 + 4 = 8, unbiased variance 8 / 8: std 1. With eps = 1 the scale is
    # 1/2. Group means 2, 1 and 0.6.
    groups = [[3.0, 1.0], [1.0, 1.0], [1.0, 1.0, 1.0, 1.0, -1.0]]
    first, second, third = group_advantages(groups, kind="batch_std", eps=1.0)
    assert first == (0.5, -0.5)
    assert second == (0.0, 0.0)
    assert third == pytest.approx((0.2, 0.2, 0.2, 0.2, -0.8), rel=1e-14)


def test_advantages_that_leave_one_out() -> None:
    rewards = [1.0, 0.5, -0.25, 3.0, 0.0]
    expected = [
        reward - sum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i, reward in enumerate(rewards)
    ]
    assert group_advantages([rewards], kind="leave_one_out", eps=7.0)[0] == pytest.approx(expected, rel=1e-14)
    assert group_advantages([[1.0, 0.0]], kind="leave_one_out", eps=7.0) == [(1.0, -1.0)]


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out"])
def test_other_groups_play_no_part(kind: str) -> None:
    groups = [[1.0, 0.0, 0.0], [5.0, -5.0], [2.0, 2.0]]
    alone = [group_advantages([rewards], kind=kind, eps=1e-6)[0] for rewards in groups]
    assert group_advantages(groups, kind=kind, eps=1e-6) == alone


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_equal_rewards_give_exactly_0(kind: str, reward: float, size: int) -> None:
    groups = [[reward] * size, [0.0, 1.0]]
    assert group_advantages(groups, kind=kind, eps=1e-6)[0] == (0.0,) * size
    assert group_advantages(groups[:1], kind=kind, eps=1e-6) == [(0.0,) * size]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "is_clipped"),
    [
        # Clip range [0.8, 1.28]. Where it is not clipped, d loss / d log p = -r A.
        # Above the range, a good token gains nothing beyond 1.28, and a bad one is pushed down with its whole ratio.
        (1.4, 1.0, -1.28, 0.0, True),
        (1.4, -1.0, 1.4, 1.4, False),
        (1.29, 2.0, -2.56, 0.0, True),
        (1.29, -2.0, 2.58, 2.58, False),
        # Below the range, a good token is pulled up, and a bad one is unchanged at 0.8.
        (0.5, 2.0, -1.0, -1.0, False),
        (0.5, -2.0, 1.6, 0.0, True),
        (0.79, 2.0, -1.58, -1.58, False),
        (0.79, -2.0, 1.6, 0.0, True),
        # Inside the range nothing is clipped. A symmetrical range of 0.2 would clip the first two.
        (1.27, 2.0, -2.54, -2.54, False),
        (1.27, -2.0, 2.54, 2.54, False),
        (0.81, 2.0, -1.62, -1.62, False),
        (0.81, -2.0, 1.62, 1.62, False),
        # r = 1 gives the plain policy gradient.
        (1.0, 0.7, -0.7, -0.7, False),
        (1.0, -0.7, 0.7, 0.7, False),
        # Without advantage there is no loss and no reported clip.
        (1.4, 0.0, 0.0, 0.0, False),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_ppo_of_one_token_which_is_also_gspo_of_a_sequence_of_one(
    name: Literal["ppo", "gspo"], ratio: float, advantage: float, loss: float, grad: float, is_clipped: bool
) -> None:
    result = run_surrogate([ratio], tokens_of(advantage=advantage), replace(DAPO, surrogate=name))
    assert result.loss == pytest.approx([loss], rel=1e-13)
    assert result.grad == pytest.approx([grad], rel=1e-13)
    assert (result.clipped, result.dual_clipped) == ([is_clipped], [False])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "is_clipped", "is_dual"),
    [
        # Clip range [0.8, 1.28], c = 3: the loss of a bad token is at most 3 |A|.
        (4.0, -2.0, 6.0, 0.0, False, True),
        (3.01, -1.0, 3.0, 0.0, False, True),
        (2.99, -1.0, 2.99, 2.99, False, False),
        (0.5, -2.0, 1.6, 0.0, True, False),
        (4.0, 2.0, -2.56, 0.0, True, False),
        (4.0, 0.0, 0.0, 0.0, False, False),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_dual_clip_of_one_token(
    name: Literal["ppo", "gspo"],
    ratio: float,
    advantage: float,
    loss: float,
    grad: float,
    is_clipped: bool,
    is_dual: bool,
) -> None:
    objective = replace(DAPO, surrogate=name, dual_clip=3.0)
    result = run_surrogate([ratio], tokens_of(advantage=advantage), objective)
    assert result.loss == pytest.approx([loss], rel=1e-13)
    assert result.grad == pytest.approx([grad], rel=1e-13)
    assert (result.clipped, result.dual_clipped) == ([is_clipped], [is_dual])


def test_gspo_of_three_sequences() -> None:
    # The geometric means of the ratios are 1.1, 2 and 1/2, far from the single ratios. Only the sequence's ratio
    # counts. Each token's gradient is -s A, or 0 where its sequence is clipped.
    tokens = tokens_of((2, 3, 3), advantage=[3.0] * 2 + [-1.0] * 3 + [-2.0] * 3)
    ratios = [1.21, 1.0, 8.0, 1.0, 1.0, 1.0, 1 / 8, 1.0]
    result = run_surrogate(ratios, tokens, replace(DAPO, surrogate="gspo"))
    assert result.loss == pytest.approx([-3.3] * 2 + [2.0] * 3 + [1.6] * 3, rel=1e-13)
    assert result.grad == pytest.approx([-3.3] * 2 + [2.0] * 3 + [0.0] * 3, rel=1e-13)
    assert result.clipped == [False] * 5 + [True] * 3
    dual = run_surrogate(ratios, tokens, replace(DAPO, surrogate="gspo", dual_clip=1.5))
    assert dual.loss == pytest.approx([-3.3] * 2 + [1.5] * 3 + [1.6] * 3, rel=1e-13)
    assert dual.grad == pytest.approx([-3.3] * 2 + [0.0] * 6, rel=1e-13)
    assert dual.dual_clipped == [False] * 2 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("ratio", "advantage", "factor", "is_clipped"),
    [
        # loss = -factor A l, gradient = -factor A, where r is limited to [0.8, 1.28]. Values are clipped, gradients
        # never.
        (1.4, 1.0, 1.28, True),
        (1.4, -1.0, 1.28, True),
        (0.5, 2.0, 0.8, True),
        (0.5, -2.0, 0.8, True),
        (1.25, 2.0, 1.25, False),
        (0.85, -2.0, 0.85, False),
    ],
)
def test_cispo_of_one_token(ratio: float, advantage: float, factor: float, is_clipped: bool) -> None:
    tokens = tokens_of(advantage=advantage)
    result = run_surrogate([ratio], tokens, replace(DAPO, surrogate="cispo"), p=0.25)
    assert result.loss == pytest.approx([factor * advantage * 2 * LN2], rel=1e-13)
    assert result.grad == pytest.approx([-factor * advantage], rel=1e-13)
    assert (result.clipped, result.dual_clipped) == ([is_clipped], [False])


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0, 1.4, 50.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_unclipped_of_one_token(ratio: float, advantage: float) -> None:
    tokens = tokens_of(advantage=advantage)
    result = run_surrogate([ratio], tokens, ObjectiveConfig(surrogate="unclipped"))
    assert result.loss == pytest.approx([-ratio * advantage], rel=1e-13)
    assert result.grad == pytest.approx([-ratio * advantage], rel=1e-13)
    assert (result.clipped, result.dual_clipped) == ([False], [False])


def random_tokens(dtype: torch.dtype, sequences: list[int]) -> tuple[Tensor, Tensor, TermTokens]:
    """Log-probs (a leaf), old ones, and tokens with advantages of both signs. Ratios are on all sides of every clip."""
    generator = torch.Generator().manual_seed(0)
    count = sum(sequences)
    logprobs, noise, advantages = torch.randn(3, count, generator=generator, dtype=dtype).unbind()
    tokens = tokens_of(sequences)
    tokens = replace(tokens, lengths=tokens.lengths.to(dtype), columns={"advantage": advantages})
    logprobs = -5 * logprobs.abs()
    return logprobs.requires_grad_(), logprobs.detach() - noise, tokens


def naive_grpo(logprobs: Tensor, old: Tensor, advantages: Tensor, eps: float) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(clip_low=0.2, clip_high=0.2),
        ObjectiveConfig(clip_low=0.2, clip_high=0.2, dual_clip=1e30),
    ],
    ids=["equal clips", "endless dual clip"],
)
def test_grpo_to_the_bit(dtype: torch.dtype, objective: ObjectiveConfig) -> None:
    logprobs, old, tokens = random_tokens(dtype, [200])
    out = surrogate(logprobs, old, tokens, objective)
    expected = naive_grpo(logprobs, old, tokens["advantage"], 0.2)
    (grad,) = torch.autograd.grad(out.loss.sum(), logprobs)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logprobs)
    assert torch.equal(out.loss, expected)
    assert torch.equal(grad, expected_grad)
    assert not out.dual_clipped.any()
    clipped = out.clipped
    assert clipped.any()
    assert not clipped.all()
    assert torch.equal(clipped, expected_grad == 0)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gspo_of_sequences_of_one_token_is_ppo(dual_clip: float | None) -> None:
    logprobs, old, tokens = random_tokens(torch.float64, [1] * 200)
    ppo, gspo = (
        surrogate(logprobs, old, tokens, replace(DAPO, surrogate=name, dual_clip=dual_clip))
        for name in ("ppo", "gspo")
    )
    grads = [torch.autograd.grad(out.loss.sum(), logprobs)[0] for out in (ppo, gspo)]
    torch.testing.assert_close(gspo.loss, ppo.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-13, atol=0)
    assert torch.equal(gspo.clipped, ppo.clipped)
    assert torch.equal(gspo.dual_clipped, ppo.dual_clipped)


def test_gspo_clips_whole_sequences_in_fp32() -> None:
    """With GSPO's narrow published clips, a sequence's ratio must not depend on how probable each token is."""
    generator = torch.Generator().manual_seed(0)
    objective = ObjectiveConfig(surrogate="gspo", clip_low=3e-4, clip_high=4e-4)
    logprobs = -20 * torch.rand(200, generator=generator)
    tokens = tokens_of((200,))
    tokens = replace(tokens, lengths=tokens.lengths.float(), columns={"advantage": torch.ones(200)})
    for gap in torch.linspace(3.98e-4, 4.02e-4, 101):
        out = surrogate(logprobs, logprobs - gap, tokens, objective)
        assert out.loss.unique().numel() == 1
        assert out.clipped.unique().numel() == 1


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "unclipped"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [100.0, math.inf, -100.0, -math.inf])
def test_one_broken_token_does_not_overflow(
    name: Literal["ppo", "gspo", "cispo", "unclipped"], advantage: float, difference: float
) -> None:
    logprobs = torch.tensor([-0.5], requires_grad=True)
    tokens = tokens_of(advantage=advantage)
    out = surrogate(
        logprobs,
        logprobs.detach() - difference,
        tokens,
        ObjectiveConfig(surrogate=name, clip_low=0.2 if name == "unclipped" else 1.0),
    )
    out.loss.sum().backward()
    # The log-ratio is limited to +-20, and the clip range is [0, 1.2].
    ratio = math.exp(math.copysign(20, difference))
    within = min(ratio, 1.2)
    expected = {
        "unclipped": -ratio * advantage,
        "cispo": within * advantage * 0.5,
    }.get(name, -min(ratio * advantage, within * advantage))
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    if name in ("ppo", "unclipped"):
        assert logprobs.grad.tolist() == [0.0]


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "unclipped"])
def test_old_logprobs_and_advantages_are_constants(
    name: Literal["ppo", "gspo", "cispo", "unclipped"],
) -> None:
    logprobs, old, tokens = random_tokens(torch.float64, [3, 5])
    old.requires_grad_()
    out = surrogate(logprobs, old, tokens, ObjectiveConfig(surrogate=name))
    out.loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() > 0
    assert old.grad is None


GEOMETRIC = math.sqrt(2)


@pytest.mark.parametrize(
    ("level", "mode", "weights", "outside"),
    [
        # Three sequences, old / rollout = 4, 1/2 | 1/10, 5/4, 1 | 6/5; allowed is [0.6, 1.5].
        # Products 2, 1/8, 6/5; geometric means sqrt 2, 1/2, 6/5.
        ("token", "truncate", [1.5, 0.5, 0.1, 1.25, 1.0, 1.2], "T....."),
        ("token", "clamp", [1.5, 0.6, 0.6, 1.25, 1.0, 1.2], "TTT..."),
        ("token", "mask", [0.0, 0.0, 0.0, 1.25, 1.0, 1.2], "TTT..."),
        ("token", "reject", [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "TTT..."),
        ("sequence", "truncate", [1.5, 1.5, 0.125, 0.125, 0.125, 1.2], "TT...."),
        ("sequence", "clamp", [1.5, 1.5, 0.6, 0.6, 0.6, 1.2], "TTTTT."),
        ("sequence", "mask", [0.0, 0.0, 0.0, 0.0, 0.0, 1.2], "TTTTT."),
        ("sequence", "reject", [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], "TTTTT."),
        ("geometric", "truncate", [GEOMETRIC, GEOMETRIC, 0.5, 0.5, 0.5, 1.2], "......"),
        ("geometric", "clamp", [GEOMETRIC, GEOMETRIC, 0.6, 0.6, 0.6, 1.2], "..TTT."),
        ("geometric", "mask", [GEOMETRIC, GEOMETRIC, 0.0, 0.0, 0.0, 1.2], "..TTT."),
        ("geometric", "reject", [1.0, 1.0, 0.0, 0.0, 0.0, 1.0], "..TTT."),
    ],
)
def test_correction_weights(level: Any, mode: Any, weights: list[float], outside: str) -> None:
    rollout = [-1.0, -2.0, -0.5, -3.0, -1.5, -0.25]
    gaps = logs([4.0, 0.5, 0.1, 1.25, 1.0, 1.2])
    old = torch.tensor(rollout, dtype=torch.float64) + torch.tensor(gaps, dtype=torch.float64)
    found, is_outside = correction_weights(
        old.requires_grad_(),
        tokens_of((2, 3, 1), rollout_logprob=rollout),
        CorrectionConfig(level=level, mode=mode, low=0.0 if mode == "truncate" else 0.6, high=1.5),
    )
    assert found.tolist() == pytest.approx(weights, rel=1e-13)
    assert is_outside.tolist() == [letter == "T" for letter in outside]
    assert not found.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("gap", [100.0, -100.0])
def test_correction_weights_of_a_broken_sequence_are_finite(level: Any, gap: float) -> None:
    found, _ = correction_weights(
        torch.full((5,), gap),
        tokens_of((5,), rollout_logprob=0.0),
        CorrectionConfig(level=level, high=1e30),
    )
    assert found.tolist() == pytest.approx([math.exp(math.copysign(20, gap))] * 5, rel=1e-6)


@pytest.mark.parametrize(
    ("estimator", "p", "reference_p", "value", "grad"),
    [
        # d = log(reference_p / p) = -ln 2, and ln 2. The gradient in l is 1, -d and 1 - e^d.
        ("k1", 0.5, 0.25, LN2, 1.0),
        ("k2", 0.5, 0.25, LN2**2 / 2, LN2),
        ("k3", 0.5, 0.25, LN2 - 0.5, 0.5),
        ("k1", 0.25, 0.5, -LN2, 1.0),
        ("k2", 0.25, 0.5, LN2**2 / 2, -LN2),
        ("k3", 0.25, 0.5, 1 - LN2, -1.0),
        # Both policies are equal.
        ("k1", 0.3, 0.3, 0.0, 1.0),
        ("k2", 0.3, 0.3, 0.0, 0.0),
        ("k3", 0.3, 0.3, 0.0, 0.0),
    ],
)
def test_kl_of_one_token(estimator: str, p: float, reference_p: float, value: float, grad: float) -> None:
    logprobs = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([math.log(reference_p)], dtype=torch.float64, requires_grad=True)
    kl = kl_penalty(logprobs, reference, estimator)
    kl.sum().backward()
    assert logprobs.grad is not None
    assert kl.item() == pytest.approx(value, rel=1e-13)
    assert logprobs.grad.item() == pytest.approx(grad, rel=1e-13)
    assert reference.grad is None


def test_k3_is_never_negative_and_finite_for_a_broken_token() -> None:
    logprobs, reference = (-3 * torch.rand(2, 1000, dtype=torch.float64)).unbind()
    assert (kl_penalty(logprobs, reference, "k3") >= 0).all()
    broken = torch.tensor([-0.5, -1e4], requires_grad=True)
    kl = kl_penalty(broken, torch.tensor([-1e4, -0.5]), "k3")
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([19 + math.exp(-20), math.exp(20) - 21], rel=1e-6)
    assert broken.grad is not None
    assert broken.grad.tolist() == [0.0, 0.0]


def grads_of(stats: TokenStats) -> tuple[list[float], list[float]]:
    """Return the gradients of log-probs and entropies. They are 0 where unused."""

    def grad(leaf: Tensor) -> list[float]:
        return [0.0] * len(leaf) if leaf.grad is None else leaf.grad.tolist()

    return grad(stats.logprobs), grad(stats.entropy)


def test_ratio_from() -> None:
    # p = 0.3; the rollout engine has 0.2, the trainer before the update 0.25. The ratios are 1.5, 1 and 1.2.
    tokens = tokens_of(advantage=2.0, rollout_logprob=math.log(0.2), old_logprob=math.log(0.25))
    found = {}
    sources: tuple[Literal["rollout", "current", "recomputed"], ...] = ("rollout", "current", "recomputed")
    for source in sources:
        stats = stats_of([0.3])
        out = policy_loss(stats, tokens, ObjectiveConfig(ratio_from=source, clip_high=0.6))
        out.loss.sum().backward()
        found[source] = [out.loss.item(), *grads_of(stats)[0]]
        assert out.means["logprob_gap"].tolist() == pytest.approx([math.log(1.5)])
        assert out.means["probability_error"].tolist() == pytest.approx([1.5])
        assert out.maxima["logprob_gap_max"].tolist() == pytest.approx([math.log(1.5)])
    assert found["rollout"] == pytest.approx([-3.0, -3.0])
    assert found["current"] == pytest.approx([-2.0, -2.0])
    assert found["recomputed"] == pytest.approx([-2.4, -2.4])


def test_policy_loss_with_everything() -> None:
    # Ratios against the recomputed p: 0.5 / 0.25 = 2, A = 1, clipped to 1.2; 0.6 / 0.15 = 4, A = -1, held at 3;
    # 0.3 / 0.3 = 1, A = -2. Weights 0.25 / 0.2 = 1.25; 0.15 / 0.05 = 3, cut to 2; 0.3 / 0.6 = 0.5.
    # k3 with d = 0; ln 2, value 1 - ln 2, gradient -1; -ln 2, value ln 2 - 1/2, gradient 1/2; times 0.1.
    # Entropies 0.5, 1 and 2, times 0.01.
    stats = stats_of([0.5, 0.6, 0.3], entropy=[0.5, 1.0, 2.0])
    tokens = tokens_of(
        (1, 2),
        advantage=[1.0, -1.0, -2.0],
        old_logprob=logs([0.25, 0.15, 0.3]),
        rollout_logprob=logs([0.2, 0.05, 0.6]),
        reference_logprob=logs([0.5, 1.2, 0.15]),
    )
    objective = ObjectiveConfig(
        ratio_from="recomputed",
        dual_clip=3.0,
        correction=CorrectionConfig(),
        kl=KLConfig(estimator="k3", coefficient=0.1),
        entropy_bonus=0.01,
    )
    out = policy_loss(stats, tokens, objective)
    out.loss.sum().backward()
    kl = [0.0, 1 - LN2, LN2 - 0.5]
    assert out.loss.tolist() == pytest.approx(
        [-1.5 - 0.005, 6.0 + 0.1 * kl[1] - 0.01, 1.0 + 0.1 * kl[2] - 0.02], rel=1e-12
    )
    logprob_grad, entropy_grad = grads_of(stats)
    assert logprob_grad == pytest.approx([0.0, -0.1, 1.0 + 0.05], rel=1e-12, abs=1e-15)
    assert entropy_grad == [-0.01] * 3
    assert not any(
        value.requires_grad for group in (out.losses, out.means, out.maxima) for value in group.values()
    )
    assert {name: values.tolist() for name, values in out.losses.items()} == {
        "policy_loss": pytest.approx([-1.5, 6.0, 1.0], rel=1e-12)
    }
    gaps = logs([2.5, 12.0, 2.0])
    assert {name: values.tolist() for name, values in out.means.items()} == {
        "entropy": [0.5, 1.0, 2.0],
        "clip_fraction": [1.0, 0.0, 0.0],
        "dual_clip_fraction": [0.0, 1.0, 0.0],
        "logprob_gap": pytest.approx(gaps),
        "probability_error": pytest.approx([2.5, 12.0, 2.0]),
        "correction_weight": pytest.approx([1.25, 2.0, 0.5]),
        "correction_outside": [0.0, 1.0, 0.0],
        "kl": pytest.approx(kl),
    }
    assert {name: values.tolist() for name, values in out.maxima.items()} == {
        "logprob_gap_max": pytest.approx(gaps),
        "ratio_max": pytest.approx([0.0, 4.0, 1.0]),
    }


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("ratio_from", ["current", "recomputed"])
def test_the_correction_only_scales_the_surrogate(level: Any, ratio_from: Any) -> None:
    tokens = tokens_of(
        (2, 2),
        advantage=[1.0, -1.0, 2.0, -2.0],
        old_logprob=logs([0.3, 0.4, 0.5, 0.1]),
        rollout_logprob=logs([0.2, 0.5, 0.7, 0.1]),
    )
    grads, weights = [], torch.zeros(0)
    for correction in (CorrectionConfig(mode="none"), CorrectionConfig(level=level)):
        stats = stats_of([0.3, 0.45, 0.45, 0.1])
        out = policy_loss(stats, tokens, ObjectiveConfig(ratio_from=ratio_from, correction=correction))
        out.loss.sum().backward()
        grads.append(torch.tensor(grads_of(stats)[0], dtype=torch.float64))
        weights = out.means.get("correction_weight", weights)
    torch.testing.assert_close(grads[1], grads[0] * weights, rtol=1e-13, atol=0)
    assert grads[0].all()
    assert (weights != 1).any()


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "unclipped"])
@pytest.mark.parametrize("level", [None, "token", "sequence"])
def test_without_an_advantage_there_is_neither_loss_nor_gradient(name: Any, level: Any) -> None:
    """The policy term does what ``Term.zero_gradient_column`` promises."""
    correction = None if level is None else CorrectionConfig(level=level, high=2.0)
    clips = {} if name == "unclipped" else {"clip_low": 0.2, "clip_high": 0.28}
    objective = ObjectiveConfig(surrogate=name, correction=correction, ratio_from="recomputed", **clips)
    stats = stats_of([0.9, 0.05, 1e-4])
    tokens = tokens_of((3,), advantage=0.0, rollout_logprob=[-0.5, -2, -2], old_logprob=[-0.4, -2, -3])
    output = policy_loss(stats, tokens, objective)
    output.loss.sum().backward()
    assert output.loss.tolist() == [0.0] * 3
    assert stats.logprobs.grad is not None
    assert stats.logprobs.grad.tolist() == [0.0] * 3
    assert stats.entropy.grad is None
