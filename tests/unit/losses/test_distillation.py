"""Distillation: the sampled-token estimates against sums over a whole vocabulary in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_chord.losses.distillation import DIVERGENCES, distilled

VOCABULARY = 7


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first * (first.log() - second.log())).sum()


EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda p, teacher: kl(p, teacher),
    "forward_kl": lambda p, teacher: kl(teacher, p),
    "jsd": lambda p, teacher: (kl(p, (p + teacher) / 2) + kl(teacher, (p + teacher) / 2)) / 2,
}


def distributions(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of the policy, a leaf, and the teacher's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].softmax(0)


def estimate(
    divergence: str, logprobs: Tensor, teacher: Tensor, old: Tensor, *, max_ratio: float = 1e9
) -> Tensor:
    return distilled(
        logprobs, teacher, old, divergence=divergence, max_ratio=max_ratio, max_log_ratio=20.0
    ).loss


def test_there_is_an_exact_form_of_each() -> None:
    assert EXACT.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_over_the_policys_tokens_is_the_divergence_and_has_its_gradient(
    divergence: str, seed: int
) -> None:
    logits, teacher = distributions(seed)
    exact = EXACT[divergence](logits.softmax(0), teacher)
    (wanted,) = torch.autograd.grad(exact, logits)

    logprobs = logits.log_softmax(0)
    losses = estimate(divergence, logprobs, teacher.log(), logprobs.detach())
    mean = (logprobs.detach().exp() * losses).sum()  # each token as often as the policy samples it
    (found,) = torch.autograd.grad(mean, logits)
    assert mean.item() == pytest.approx(exact.item(), rel=1e-12)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)
    assert wanted.abs().max() > 0.01


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_older_tokens_get_the_ratio_as_weight(divergence: str) -> None:
    """With tokens of another policy the weighted mean is the same."""
    logits, teacher = distributions(3)
    old = distributions(4)[1]
    (wanted,) = torch.autograd.grad(EXACT[divergence](logits.softmax(0), teacher), logits)
    losses = estimate(divergence, logits.log_softmax(0), teacher.log(), old.log())
    (found,) = torch.autograd.grad((old * losses).sum(), logits)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)


def test_the_ratio_is_limited_from_above() -> None:
    logprobs, teacher = torch.tensor([-1.0, -1.0]).double(), torch.tensor([-0.5, -0.5]).double()
    old = torch.tensor([-1.0 - math.log(5), -1.0 + math.log(5)]).double()
    found = distilled(logprobs, teacher, old, divergence="reverse_kl", max_ratio=2.0, max_log_ratio=20.0)
    assert found.weight.tolist() == pytest.approx([2.0, 0.2])


@pytest.mark.parametrize(
    ("divergence", "value", "slope"),
    [
        ("reverse_kl", 4 - 1 - math.log(4), -math.log(4)),
        ("forward_kl", 4 * math.log(4) - 3, -3.0),
        ("jsd", (4 * math.log(4) - 5 * math.log(2.5)) / 2, -math.log(2.5) / 2),
    ],
)
def test_a_token_by_hand(divergence: str, value: float, slope: float) -> None:
    # The teacher gives the token 0.8, the policy 0.2: u = 4, and the policy learns to say it more often.
    logprob = torch.tensor([math.log(0.2)], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([math.log(0.8)], dtype=torch.float64)
    loss = estimate(divergence, logprob, teacher, logprob.detach())
    loss.sum().backward()
    assert loss.item() == pytest.approx(value)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_agrees_teaches_nothing_and_gets_no_gradient(divergence: str) -> None:
    logprobs = torch.tensor([-0.1, -3.0], requires_grad=True)
    teacher = torch.tensor([-0.1, -3.0], requires_grad=True)
    loss = estimate(divergence, logprobs, teacher, torch.tensor([-0.2, -2.0])).sum()
    loss.backward()
    assert loss.item() == 0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0]
    assert teacher.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_log_ratio_is_limited_on_both_sides(divergence: str) -> None:
    logprobs = torch.tensor([-30.0, -0.5], requires_grad=True)
    teacher = torch.tensor([-0.5, -30.0])

    def grad_at(limit: float) -> list[float]:
        found = distilled(
            logprobs, teacher, logprobs.detach(), divergence=divergence, max_ratio=2.0, max_log_ratio=limit
        )
        assert found.log_ratio.tolist() == [limit, -limit]
        (grad,) = torch.autograd.grad(found.loss.sum(), logprobs)
        return grad.tolist()

    (rare, sure), (rarer, surer) = grad_at(1.0), grad_at(2.0)
    assert rarer < rare < 0 < sure < surer
