"""CHORD's sum over a packed batch: hand arithmetic, both ends of mu bit for bit, constants, and any split of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chord.config import ObjectiveConfig
from megatron_chord.losses.objective import LossTokens, StepWeights, chord_loss

Batch = dict[str, Tensor]


def make_batch(tokens: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """About as many expert tokens as policy tokens, in random order; some ratios clip on either side."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, noise, advantages, entropy = torch.randn(4, tokens, generator=generator, dtype=dtype).unbind()
    logprobs = -logprobs.abs() - 0.05
    is_expert = torch.rand(tokens, generator=generator) < 0.5
    return {
        "logprobs": logprobs,
        "entropy": entropy.abs(),
        "is_expert": is_expert,
        "advantages": advantages.masked_fill(is_expert, 0),
        "rollout_logprobs": (logprobs + 0.4 * noise).masked_fill(is_expert, 0),
    }


def select(batch: Batch, where: Tensor) -> Batch:
    return {name: column[where] for name, column in batch.items()}


def run(
    batch: Batch, weights: StepWeights, objective: ObjectiveConfig | None = None
) -> tuple[dict[str, float], Tensor, Tensor]:
    """The loss and what comes with it, and the gradients of the log-probs and of the entropy (0 where unused)."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    entropy = batch["entropy"].clone().requires_grad_()
    loss, sums, maxima = chord_loss(
        logprobs,
        entropy,
        LossTokens(
            is_expert=batch["is_expert"],
            advantages=batch["advantages"],
            rollout_logprobs=batch["rollout_logprobs"],
        ),
        weights,
        objective or ObjectiveConfig(),
    )
    assert not any(value.requires_grad for value in [*sums.values(), *maxima.values()])
    loss.backward()
    assert logprobs.grad is not None
    entropy_grad = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    values = {"loss": loss.item()} | {name: value.item() for name, value in (sums | maxima).items()}
    return values, logprobs.grad, entropy_grad


def weights_of(batch: Batch, mu: float) -> StepWeights:
    num_expert = int(batch["is_expert"].sum())
    return StepWeights(
        mu=mu, num_policy_tokens=len(batch["is_expert"]) - num_expert, num_expert_tokens=num_expert
    )


def test_two_policy_tokens_and_one_expert_token_by_hand() -> None:
    # r = 0.6 / 0.4 = 1.5 clipped to 1.2, A = 2: loss -2.4, no gradient. r = 0.3 / 0.3 = 1, A = -1: loss 1, gradient 1.
    # Expert, p = 1/2, phi = 1/4: loss ln 2 / 4, gradient -1/4. Entropies 0.5 and 0.25 at the policy tokens.
    # mu = 0.25 over counts of the whole step, of which this is a part: 0.75 / 10 and 0.25 / 5.
    p = torch.tensor([0.6, 0.5, 0.3], dtype=torch.float64)
    batch = {
        "logprobs": p.log(),
        "entropy": torch.tensor([0.5, 9.0, 0.25], dtype=torch.float64),
        "is_expert": torch.tensor([False, True, False]),
        "advantages": torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64),
        "rollout_logprobs": torch.tensor([math.log(0.4), 0.0, math.log(0.3)], dtype=torch.float64),
    }
    weights = StepWeights(mu=0.25, num_policy_tokens=10, num_expert_tokens=5)
    values, grad, entropy_grad = run(batch, weights, ObjectiveConfig(entropy_bonus=0.1))
    ln2 = math.log(2)
    assert values == pytest.approx(
        {
            "loss": 0.075 * (-2.4 + 1.0 - 0.1 * 0.75) + 0.05 * ln2 / 4,
            "policy_loss": -1.4,
            "expert_loss": ln2 / 4,
            "expert_nll": ln2,
            "expert_p": 0.5,
            "expert_phi": 0.25,
            "entropy": 0.75,
            "clip_fraction": 1.0,
            "logprob_gap": math.log(1.5),
            "logprob_gap_max": math.log(1.5),
        },
        rel=1e-13,
    )
    assert grad.tolist() == pytest.approx([0.0, -0.05 / 4, 0.075], rel=1e-13)
    assert entropy_grad.tolist() == pytest.approx([-0.0075, 0.0, -0.0075], rel=1e-13)


def test_the_ratio_from_the_current_policy_is_1_and_keeps_its_gradient() -> None:
    batch = make_batch()
    weights = weights_of(batch, mu=0.0)
    values, grad, _ = run(batch, weights, ObjectiveConfig(ratio_from="current"))
    policy = ~batch["is_expert"]
    assert values["clip_fraction"] == 0
    assert values["policy_loss"] == pytest.approx(-batch["advantages"][policy].sum().item(), rel=1e-12)
    torch.testing.assert_close(grad[policy], -batch["advantages"][policy] / int(policy.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entropy_bonus", [0.0, 0.03])
def test_mu_0_is_grpo_to_the_bit(dtype: torch.dtype, entropy_bonus: float) -> None:
    batch = make_batch(dtype=dtype)
    objective = ObjectiveConfig(entropy_bonus=entropy_bonus, clip_low=0.1, clip_high=0.3)
    policy = ~batch["is_expert"]
    num_policy = int(policy.sum())
    _, grad, entropy_grad = run(batch, weights_of(batch, mu=0.0), objective)
    assert not grad[~policy].any()
    assert not entropy_grad[~policy].any()

    logprobs = batch["logprobs"][policy].requires_grad_()
    entropy = batch["entropy"][policy].requires_grad_()
    ratio = (logprobs - batch["rollout_logprobs"][policy]).exp()
    advantages = batch["advantages"][policy]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
    ((-surrogate - entropy_bonus * entropy) * (1 / num_policy)).sum().backward()
    assert logprobs.grad is not None
    assert entropy.grad is not None
    assert torch.equal(grad[policy], logprobs.grad)
    assert torch.equal(entropy_grad[policy], entropy.grad)
    clipped = logprobs.grad == 0
    assert 0 < clipped.sum() < num_policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("expert_weight", ["one", "p", "phi"])
def test_mu_1_is_sft_to_the_bit(dtype: torch.dtype, expert_weight: Any) -> None:
    batch = make_batch(dtype=dtype)
    objective = ObjectiveConfig(expert_weight=expert_weight, entropy_bonus=0.03)
    expert = batch["is_expert"]
    _, grad, entropy_grad = run(batch, weights_of(batch, mu=1.0), objective)
    assert not grad[~expert].any()
    assert not entropy_grad.any()
    p = batch["logprobs"][expert].exp()
    weight = {"one": torch.ones_like(p), "p": p, "phi": p * (1 - p)}[expert_weight]
    assert torch.equal(grad[expert], -weight * (1 / int(expert.sum())))


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_advantages_and_rollout_logprobs_carry_no_gradient(mu: float) -> None:
    batch = make_batch()
    constants = [batch[name].requires_grad_() for name in ("advantages", "rollout_logprobs")]
    _, grad, _ = run(batch, weights_of(batch, mu))
    assert grad.any()
    assert [tensor.grad for tensor in constants] == [None, None]


def test_phi_is_detached_in_the_whole_objective() -> None:
    """A rare expert token is pulled up; with phi's own gradient it would be pushed down (see test_expert)."""
    batch = select(make_batch(), torch.tensor([0, 1]))
    batch |= {"is_expert": torch.tensor([True, True]), "advantages": torch.zeros(2, dtype=torch.float64)}
    batch["logprobs"] = torch.tensor([0.01, 0.1], dtype=torch.float64).log()
    _, grad, _ = run(batch, StepWeights(mu=1.0, num_policy_tokens=0, num_expert_tokens=1))
    # -phi: 0.01 x 0.99 and 0.1 x 0.9.
    assert grad.tolist() == pytest.approx([-0.0099, -0.09], rel=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_no_tokens_give_0_still_connected_to_the_graph(mu: float) -> None:
    batch = select(make_batch(), torch.zeros(40, dtype=torch.bool))
    values, grad, _ = run(batch, StepWeights(mu=mu, num_policy_tokens=0, num_expert_tokens=0))
    assert set(values.values()) == {0.0}
    assert grad.shape == (0,)


@pytest.mark.parametrize("missing", ["policy", "expert"])
def test_a_missing_kind_adds_exactly_0(missing: str) -> None:
    whole = make_batch()
    kept = select(whole, whole["is_expert"] == (missing == "policy"))
    weights = weights_of(kept, mu=0.3)
    values, _, _ = run(kept, weights)
    share = 0.7 / len(kept["logprobs"]) if missing == "expert" else 0.3 / len(kept["logprobs"])
    other = "policy" if missing == "expert" else "expert"
    assert values[f"{missing}_loss"] == 0.0
    assert values["loss"] == pytest.approx(share * values[f"{other}_loss"], rel=1e-12)
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("seed", range(20))
def test_any_split_of_a_step_adds_up_to_the_whole(seed: int) -> None:
    batch = make_batch(seed=seed)
    objective = ObjectiveConfig(entropy_bonus=0.01)
    weights = weights_of(batch, mu=0.3)
    whole, whole_grad, whole_entropy_grad = run(batch, weights, objective)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(40, generator=generator)
    part_of = torch.randint(6, (40,), generator=generator) * (torch.arange(40) > 0)  # some parts may be empty
    parts = [order[part_of == part] for part in range(7)]  # the last one always is
    results = [run(select(batch, part), weights, objective) for part in parts]
    for name, value in whole.items():
        split = [values[name] for values, _, _ in results]
        assert (max(split) if name.endswith("max") else sum(split)) == pytest.approx(value, rel=1e-12), name
    for part, (_, grad, entropy_grad) in zip(parts, results, strict=True):
        assert torch.equal(grad, whole_grad[part])
        assert torch.equal(entropy_grad, whole_entropy_grad[part])
