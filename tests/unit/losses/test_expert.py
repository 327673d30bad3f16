"""The three token weights, and that they are constants: the gradient reaching the logit is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_chord.losses.expert import weighted_nll

PROBABILITIES = [1e-6, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.23, 0.24, 1 / 3, 0.4, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6]


def push_on_target(p: float, loss: Callable[[Tensor], Tensor]) -> float:
    """-d loss / d z of the target's logit, through a log_softmax over four tokens in which it has probability p."""
    others = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) * (1 - p)
    logits = torch.cat([torch.tensor([p], dtype=torch.float64), others]).log().requires_grad_()
    loss(torch.log_softmax(logits, 0)[:1]).sum().backward()
    assert logits.grad is not None
    return -logits.grad[0].item()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # p = 1/4: -log p = 2 ln 2; weights 1, 1/4, and 1/4 x 3/4 = 3/16.
        ("one", 2 * math.log(2)),
        ("p", math.log(2) / 2),
        ("phi", 3 / 8 * math.log(2)),
    ],
)
def test_one_token(weight: str, expected: float) -> None:
    logprobs = torch.tensor([-2 * math.log(2)], dtype=torch.float64)
    assert weighted_nll(logprobs, weight).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(
    ("weight", "oracle"),
    [
        ("one", lambda p: 1 - p),
        ("p", lambda p: p * (1 - p)),
        ("phi", lambda p: p * (1 - p) ** 2),
    ],
)
def test_gradient_oracle(p: float, weight: str, oracle: Callable[[float], float]) -> None:
    push = push_on_target(p, lambda logprobs: weighted_nll(logprobs, weight))
    assert push == pytest.approx(oracle(p), rel=1e-9)


def test_phi_pushes_most_at_one_third() -> None:
    pushes = {
        p: push_on_target(p, lambda logprobs: weighted_nll(logprobs, "phi")) for p in (0.32, 1 / 3, 0.35)
    }
    assert pushes[1 / 3] == pytest.approx(4 / 27, rel=1e-12) == max(pushes.values())


@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.01, 0.1, 0.2, 0.2355])
def test_a_rare_expert_token_is_pulled_up_because_phi_is_detached(p: float) -> None:
    def without_stop_gradient(logprobs: Tensor) -> Tensor:
        return -logprobs.exp() * (1 - logprobs.exp()) * logprobs

    wrong = push_on_target(p, without_stop_gradient)
    assert wrong == pytest.approx(p * (1 - p) * ((1 - 2 * p) * math.log(p) + 1 - p), rel=1e-9)
    assert wrong < 0 < push_on_target(p, lambda logprobs: weighted_nll(logprobs, "phi"))
    # The sign changes at 0.2356, so the two could not be told apart by their sign above it.
    assert push_on_target(0.2357, without_stop_gradient) > 0


@pytest.mark.parametrize("weight", ["one", "p", "phi"])
def test_certain_and_impossible_tokens_are_finite(weight: str) -> None:
    logprobs = torch.tensor([0.0, -1e4], requires_grad=True)
    loss = weighted_nll(logprobs, weight)
    loss.sum().backward()
    assert logprobs.grad is not None
    # p = 1: -log p is 0. p = 0 in fp32: 10000 without a weight, else 0.
    assert loss.tolist() == [0.0, 1e4 if weight == "one" else 0.0]
    assert logprobs.grad.tolist() == {"one": [-1.0, -1.0], "p": [-1.0, 0.0], "phi": [0.0, 0.0]}[weight]
