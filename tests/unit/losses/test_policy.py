"""Group advantages and the clipped surrogate, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_chord.losses.policy import clipped_surrogate, group_advantages


def test_advantages_with_the_unbiased_standard_deviation() -> None:
    # Mean 0.25; squared deviations 0.5625 + 3 x 0.0625 = 0.75; unbiased variance 0.75 / 3 = 0.25, std 0.5.
    # With eps = 0.5 the scale is 1.0, without it 0.5.
    rewards = [1.0, 0.0, 0.0, 0.0]
    assert group_advantages(rewards, use_std=True, eps=0.5) == (0.75, -0.25, -0.25, -0.25)
    assert group_advantages(rewards, use_std=True, eps=0.0) == (1.5, -0.5, -0.5, -0.5)


def test_advantages_without_standard_deviation() -> None:
    # Mean 0.5. eps plays no part.
    assert group_advantages([2.0, 0.0, 0.0, 0.0], use_std=False, eps=7.0) == (1.5, -0.5, -0.5, -0.5)


@pytest.mark.parametrize("use_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_equal_rewards_give_exactly_0(use_std: bool, reward: float, size: int) -> None:
    assert group_advantages([reward] * size, use_std=use_std, eps=1e-6) == (0.0,) * size


@pytest.mark.parametrize(
    ("old_p", "new_p", "advantage", "loss", "grad", "is_clipped"),
    [
        # Clip range [0.8, 1.28]. Where it is not clipped, d loss / d log p = -r A.
        # r = 0.7 / 0.5 = 1.4 is above: the gain of a good token stops at 1.28 ...
        (0.5, 0.7, 1.0, -1.28, 0.0, True),
        # ... and a bad token that became likelier is pushed down with all of its ratio.
        (0.5, 0.7, -1.0, 1.4, 1.4, False),
        # r = 0.5 is below: a good token is pulled up, a bad one is left alone at 0.8.
        (0.5, 0.25, 2.0, -1.0, -1.0, False),
        (0.5, 0.25, -2.0, 1.6, 0.0, True),
        # r = 1.25 and r = 0.85 lie inside, whatever the sign; a symmetrical range of 0.2 would clip the first.
        (0.4, 0.5, 2.0, -2.5, -2.5, False),
        (0.4, 0.5, -2.0, 2.5, 2.5, False),
        (0.2, 0.17, 1.0, -0.85, -0.85, False),
        # r = 1: the plain policy gradient.
        (0.3, 0.3, 0.7, -0.7, -0.7, False),
        (0.3, 0.3, -0.7, 0.7, 0.7, False),
        # No advantage: nothing, and no clip to report.
        (0.5, 0.7, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipped_surrogate_of_one_token(
    old_p: float, new_p: float, advantage: float, loss: float, grad: float, is_clipped: bool
) -> None:
    logprobs = torch.tensor([math.log(new_p)], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.log(old_p)], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    per_token, clipped = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.28)
    per_token.sum().backward()
    assert logprobs.grad is not None
    assert per_token.item() == pytest.approx(loss, rel=1e-14)
    assert logprobs.grad.item() == pytest.approx(grad, rel=1e-14)
    assert clipped.tolist() == [is_clipped]
    assert clipped.dtype == torch.bool
    assert not clipped.requires_grad


@pytest.mark.parametrize(("difference", "limit"), [(100.0, 20.0), (math.inf, 20.0), (-100.0, -20.0)])
def test_one_broken_token_does_not_overflow(difference: float, limit: float) -> None:
    logprobs = torch.tensor([-0.5], requires_grad=True)
    per_token, _ = clipped_surrogate(
        logprobs, logprobs.detach() - difference, torch.tensor([-1.0]), clip_low=0.2, clip_high=0.2
    )
    per_token.sum().backward()
    # The loss is max(r, clip(r)) with r = exp(+-20), whose gradient is 0 as the log-ratio is held.
    assert per_token.item() == pytest.approx(max(math.exp(limit), 0.8), rel=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0]


def test_old_logprobs_and_advantages_are_constants() -> None:
    logprobs, old, advantages = torch.randn(3, 8, dtype=torch.float64).unbind()
    for tensor in (logprobs, old, advantages):
        tensor.requires_grad_()
    per_token, _ = clipped_surrogate(logprobs, old, advantages, clip_low=0.2, clip_high=0.2)
    per_token.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() > 0
    assert old.grad is None
    assert advantages.grad is None
