"""The sum of terms over a packed batch equals hand arithmetic and equals each branch at mu 0 and 1, for any split of a
step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chord.config import CorrectionConfig, KLConfig, ObjectiveConfig
from megatron_chord.config_methods import EntropyTopWeight, MarginWeight, SimpleWeight, TokenWeight
from megatron_chord.losses.aggregate import SCALE
from megatron_chord.losses.objective import ObjectiveOutput, objective
from megatron_chord.losses.policy import COMPARED, policy_loss
from megatron_chord.losses.sft import sft_term
from megatron_chord.losses.terms import Term, TermOutput, TermTokens, TokenStats, empty_output

LN2 = math.log(2)
PHI = SimpleWeight(kind="phi")


def chord_terms(
    settings: ObjectiveConfig | None = None, weight: TokenWeight = PHI, cutoff: float = 1.0
) -> dict[str, Term]:
    settings = settings or ObjectiveConfig()
    return {
        "policy": Term(loss=lambda stats, tokens: policy_loss(stats, tokens, settings), pool="policy"),
        "sft": sft_term(weight=weight, cutoff=cutoff),
    }


@dataclass(frozen=True)
class Batch:
    """T tokens. Token i belongs to the term ``term[i]``. ``columns`` has the columns of all terms."""

    logprobs: Tensor
    entropy: Tensor
    rival: Tensor
    term: list[str]
    columns: dict[str, Tensor]

    def tokens_of(self, name: str) -> TermTokens:
        """Return the term's tokens. Each token is a sequence of its own."""
        index = torch.tensor([i for i, term in enumerate(self.term) if term == name], dtype=torch.int64)
        return TermTokens(
            index=index,
            sequence=torch.arange(len(index)),
            lengths=torch.ones(len(index)),
            held=torch.ones(len(index), dtype=torch.int64),
            columns={key: column[index] for key, column in self.columns.items()},
        )

    def select(self, where: Tensor) -> Batch:
        return Batch(
            self.logprobs[where],
            self.entropy[where],
            self.rival[where],
            [self.term[i] for i in where.tolist()],
            {name: column[where] for name, column in self.columns.items()},
        )


def make_batch(tokens: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """About half of the tokens are demonstration tokens, in random order. Some ratios are clipped on each side."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(8, tokens, generator=generator, dtype=dtype)
    logprobs = -draws[0].abs() - 0.05
    term = ["sft" if value < 0.5 else "policy" for value in torch.rand(tokens, generator=generator)]
    return Batch(
        logprobs,
        draws[1].abs(),
        -draws[2].abs() - 0.7,
        term,
        {
            SCALE: torch.tensor([1 / term.count(name) for name in term], dtype=dtype),
            "advantage": draws[3],
            "rollout_logprob": logprobs + 0.4 * draws[4],
            "old_logprob": logprobs + 0.4 * draws[5],
            "reference_logprob": logprobs + 0.4 * draws[6],
            "entropy_weight": (draws[7] > 0).to(dtype),
        },
    )


@dataclass(frozen=True)
class Result:
    share: ObjectiveOutput
    logprobs: Tensor
    """The gradient of the log-probs."""
    entropy: Tensor
    """The gradient of the entropies. It is 0 where they are unused."""


def run(
    batch: Batch, weights: Mapping[str, float], terms: Mapping[str, Term], names: list[str] | None = None
) -> Result:
    """Compute the objective and its gradients. ``names`` are the terms that it gets; by default it gets all of
    ``terms``."""
    logprobs = batch.logprobs.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    tokens = {name: batch.tokens_of(name) for name in names or terms}
    share = objective(TokenStats(logprobs, entropy, batch.rival), tokens, terms, weights)
    detached = [value for values in share.sums.values() for value in values.values()]
    assert not any(value.requires_grad for value in [*detached, *share.maxima.values()])
    share.loss.backward()
    assert logprobs.grad is not None
    return Result(share, logprobs.grad, torch.zeros_like(entropy) if entropy.grad is None else entropy.grad)


def values_of(share: ObjectiveOutput) -> dict[str, float]:
    """Return all values except those of the check between trainer and engine, which tests of ``losses.policy``
    cover."""
    values = {"loss": share.loss.item()}
    for sums in share.sums.values():
        values |= {name: value.item() for name, value in sums.items() if name not in COMPARED}
    return values | {name: value.item() for name, value in share.maxima.items()}


def compared_of(term: str) -> tuple[str, ...]:
    """The sums of a term for the check between trainer and engine. In these batches both terms have rollout
    log-probs."""
    return COMPARED


def chord_weights(mu: float) -> dict[str, float]:
    return {"policy": 1 - mu, "sft": mu}


def test_two_policy_tokens_and_one_sft_token_by_hand() -> None:
    # r = 0.6 / 0.4 = 1.5 clipped to 1.2, A = 2: loss -2.4, no gradient. r = 0.3 / 0.3 = 1, A = -1: loss 1, gradient 1.
    # Demonstration, p = 1/2, phi = 1/4: loss ln 2 / 4, gradient -1/4. Entropies 0.5 and 0.25 at the policy tokens.
    # Weights 0.75 and 0.25; scales 1/10 and 1/20 for the policy's, 1/5 for the demonstration's.
    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    batch = Batch(
        column(0.6, 0.5, 0.3).log(),
        column(0.5, 9.0, 0.25),
        column(-1.0, -1.0, -1.0),
        ["policy", "sft", "policy"],
        {
            SCALE: column(0.1, 0.2, 0.05),
            "advantage": column(2.0, 0.0, -1.0),
            "rollout_logprob": column(0.4, 1.0, 0.3).log(),
        },
    )
    result = run(batch, chord_weights(0.25), chord_terms(ObjectiveConfig(entropy_bonus=0.1)))
    assert values_of(result.share) == pytest.approx(
        {
            "loss": 0.75 * (0.1 * (-2.4 - 0.05) + 0.05 * (1.0 - 0.025)) + 0.25 * 0.2 * LN2 / 4,
            # The metrics are sums with their scale, without the term's weight.
            "policy_loss": 0.1 * -2.4 + 0.05 * 1.0,
            "sft_loss": 0.2 * LN2 / 4,
            # The metrics are sums that must be divided by the term's tokens.
            "sft_nll": LN2,
            "sft_p": 0.5,
            "sft_phi": 0.25,
            "token_weight": 0.25,
            "entropy": 0.75,
            "clip_fraction": 1.0,
            "logprob_gap": math.log(1.5),
            "probability_error": 1.0 + 1.5,
            "logprob_gap_max": math.log(1.5),
            "ratio_max": 1.0,  # the token with A < 0
        },
        rel=1e-13,
    )
    assert result.logprobs.tolist() == pytest.approx([0.0, -0.0125, 0.0375], rel=1e-13)
    assert result.entropy.tolist() == pytest.approx([-0.0075, 0.0, -0.00375], rel=1e-13)


def test_three_terms_with_weights_beyond_0_and_1() -> None:
    """The losses are l^2, 3 l and H. A term's metrics do not depend on its weight."""

    def term(name: str, loss: Callable[[TokenStats], Tensor]) -> Term:
        def output(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            values = loss(stats)
            detached = values.detach()
            return TermOutput(
                values, {f"{name}_loss": detached}, {f"{name}_x": tokens["x"]}, {f"{name}_max": tokens["x"]}
            )

        return Term(loss=output, pool=name)

    terms = {
        "square": term("square", lambda stats: stats.logprobs**2),
        "line": term("line", lambda stats: 3 * stats.logprobs),
        "entropy": term("entropy", lambda stats: stats.entropy),
    }
    batch = Batch(
        torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        torch.tensor([5.0, 6.0, 7.0, 8.0]),
        torch.zeros(4),
        ["line", "square", "entropy", "square"],
        {SCALE: torch.tensor([0.5, 0.25, 2.0, 0.5]), "x": torch.tensor([1.0, 4.0, 0.5, 2.0])},
    )
    result = run(batch, {"square": 2.0, "line": -1.0, "entropy": 0.25}, terms)
    # 2 (4/4 + 16/2) - 1 (-3/2) + (2 x 7) / 4
    assert values_of(result.share) == {
        "loss": 18.0 + 1.5 + 3.5,
        "square_loss": 9.0,
        "line_loss": -1.5,
        "entropy_loss": 14.0,
        "square_x": 6.0,
        "line_x": 1.0,
        "entropy_x": 0.5,
        "square_max": 4.0,
        "line_max": 1.0,
        "entropy_max": 0.5,
    }
    assert {name: set(sums) for name, sums in result.share.sums.items()} == {
        name: {f"{name}_loss", f"{name}_x"} for name in terms
    }
    assert result.logprobs.tolist() == [-1.5, -2.0, 0.0, -8.0]
    assert result.entropy.tolist() == [0.0, 0.0, 0.5, 0.0]


def test_the_ratio_from_the_current_policy_is_1_and_keeps_its_gradient() -> None:
    batch = make_batch()
    result = run(batch, chord_weights(0.0), chord_terms(ObjectiveConfig(ratio_from="current")))
    policy = batch.tokens_of("policy")
    values = values_of(result.share)
    assert values["clip_fraction"] == 0
    assert values["policy_loss"] == pytest.approx(-policy["advantage"].mean().item(), rel=1e-12)
    torch.testing.assert_close(result.logprobs[policy.index], -policy["advantage"] / len(policy.index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entropy_bonus", [0.0, 0.03])
def test_mu_0_is_grpo_to_the_bit(dtype: torch.dtype, entropy_bonus: float) -> None:
    batch = make_batch(dtype=dtype)
    settings = ObjectiveConfig(entropy_bonus=entropy_bonus, clip_low=0.1, clip_high=0.3)
    terms = chord_terms(settings)
    result = run(batch, chord_weights(0.0), terms)
    alone = run(batch, {"policy": 1.0}, terms, ["policy"])
    assert torch.equal(result.share.loss, alone.share.loss)
    assert torch.equal(result.logprobs, alone.logprobs)
    assert torch.equal(result.entropy, alone.entropy)

    policy = batch.tokens_of("policy")
    logprobs = batch.logprobs[policy.index].requires_grad_()
    entropy = batch.entropy[policy.index].requires_grad_()
    ratio = (logprobs - policy["rollout_logprob"]).exp()
    advantages = policy["advantage"]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
    ((-surrogate - entropy_bonus * entropy) * (1 / len(policy.index))).sum().backward()
    assert logprobs.grad is not None
    assert entropy.grad is not None
    assert torch.equal(result.logprobs[policy.index], logprobs.grad)
    assert torch.equal(result.entropy[policy.index], entropy.grad)
    assert not result.logprobs[batch.tokens_of("sft").index].any()
    clipped = logprobs.grad == 0
    assert 0 < clipped.sum() < len(policy.index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["one", "p", "phi"])
def test_mu_1_is_sft_to_the_bit(dtype: torch.dtype, kind: Any) -> None:
    batch = make_batch(dtype=dtype)
    terms = chord_terms(ObjectiveConfig(entropy_bonus=0.03), weight=SimpleWeight(kind=kind))
    result = run(batch, chord_weights(1.0), terms)
    alone = run(batch, {"sft": 1.0}, terms, ["sft"])
    assert torch.equal(result.share.loss, alone.share.loss)
    assert torch.equal(result.logprobs, alone.logprobs)

    demonstration = batch.tokens_of("sft")
    p = batch.logprobs[demonstration.index].exp()
    weight = {"one": torch.ones_like(p), "p": p, "phi": p * (1 - p)}[kind]
    assert torch.equal(result.logprobs[demonstration.index], -weight * (1 / len(demonstration.index)))
    assert not result.logprobs[batch.tokens_of("policy").index].any()
    assert not result.entropy.any()


def test_phi_is_detached_in_the_whole_objective() -> None:
    """A rare demonstration token becomes more probable. With phi's own gradient it would become less probable (see
    test_sft)."""
    batch = Batch(
        torch.tensor([0.01, 0.1], dtype=torch.float64).log(),
        torch.zeros(2),
        torch.zeros(2),
        ["sft", "sft"],
        {SCALE: torch.ones(2, dtype=torch.float64)},
    )
    result = run(batch, chord_weights(1.0), {"sft": chord_terms()["sft"]})
    # -phi: 0.01 x 0.99 and 0.1 x 0.9.
    assert result.logprobs.tolist() == pytest.approx([-0.0099, -0.09], rel=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_no_tokens_give_0_still_connected_to_the_graph(mu: float) -> None:
    batch = make_batch().select(torch.zeros(0, dtype=torch.int64))
    result = run(batch, chord_weights(mu), chord_terms())
    assert set(values_of(result.share).values()) == {0.0}
    assert result.logprobs.shape == (0,)


def test_no_terms_give_0_still_connected_to_the_graph() -> None:
    result = run(make_batch(), {}, {})
    assert result.share.loss.item() == 0.0
    assert (result.share.sums, result.share.maxima) == ({}, {})
    assert not result.logprobs.any()


@pytest.mark.parametrize("missing", ["policy", "sft"])
def test_a_term_without_a_token_adds_exactly_0(missing: str) -> None:
    whole, other = make_batch(), {"policy": "sft", "sft": "policy"}[missing]
    kept = whole.select(whole.tokens_of(other).index)
    terms = chord_terms(ObjectiveConfig(entropy_bonus=0.03))
    result = run(kept, chord_weights(0.3), terms)
    alone = run(kept, chord_weights(0.3), terms, [other])
    assert torch.equal(result.share.loss, alone.share.loss)
    assert torch.equal(result.logprobs, alone.logprobs)
    assert torch.equal(result.entropy, alone.entropy)
    output = empty_output(terms[missing])
    assert set(result.share.sums[missing]) == {*output.losses, *output.means, *compared_of(missing)}
    assert {value.item() for value in result.share.sums[missing].values()} == {0.0}
    assert result.share.sums[other] == alone.share.sums[other]


SETTINGS = {
    "default": ObjectiveConfig(),
    "everything": ObjectiveConfig(
        surrogate="gspo",
        ratio_from="recomputed",
        dual_clip=1.1,
        correction=CorrectionConfig(level="geometric", mode="mask", low=0.7),
        kl=KLConfig(estimator="k2", coefficient=0.1),
        entropy_bonus=0.01,
    ),
    "cispo": ObjectiveConfig(surrogate="cispo", kl=KLConfig(estimator="k1")),
    "unclipped": ObjectiveConfig(surrogate="unclipped", ratio_from="current"),
}
SFT_SETTINGS: dict[str, dict[str, Any]] = {
    "phi": {},
    "margin": {"weight": MarginWeight()},
    "entropy_top": {"weight": EntropyTopWeight(), "cutoff": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sft", SFT_SETTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_the_names_are_those_that_terms_report(settings: str, sft: str, tokens: int) -> None:
    terms = chord_terms(SETTINGS[settings], **SFT_SETTINGS[sft])
    share = run(make_batch().select(torch.arange(tokens)), chord_weights(0.3), terms).share
    outputs = {name: empty_output(term) for name, term in terms.items()}
    assert {name: set(sums) for name, sums in share.sums.items()} == {
        name: {*output.losses, *output.means, *compared_of(name)} for name, output in outputs.items()
    }
    assert set(share.maxima) == {key for output in outputs.values() for key in output.maxima}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("settings", SETTINGS)
def test_any_split_of_a_step_adds_up_to_the_whole(seed: int, settings: str) -> None:
    batch = make_batch(seed=seed)
    terms = chord_terms(SETTINGS[settings], **list(SFT_SETTINGS.values())[seed % len(SFT_SETTINGS)])
    weights = chord_weights(0.3)
    whole = run(batch, weights, terms)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(40, generator=generator)
    part_of = torch.randint(6, (40,), generator=generator) * (torch.arange(40) > 0)  # some parts may be empty
    parts = [order[part_of == part] for part in range(7)]  # the last one always is
    results = [run(batch.select(part), weights, terms) for part in parts]
    split = [values_of(result.share) for result in results]
    for name, value in values_of(whole.share).items():
        values = [found[name] for found in split]
        assert (max(values) if name.endswith("max") else sum(values)) == pytest.approx(value, rel=1e-11), name
    for part, result in zip(parts, results, strict=True):
        assert torch.equal(result.logprobs, whole.logprobs[part])
        assert torch.equal(result.entropy, whole.entropy[part])


def test_sequences_of_several_tokens_split_between_them() -> None:
    """GSPO has sequences of 3, 1 and 4 tokens. They are computed together, and one sequence at a time."""
    sizes = [3, 1, 4]
    batch = make_batch(tokens=8)
    term = chord_terms(ObjectiveConfig(surrogate="gspo", clip_low=0.1, clip_high=0.1))["policy"]

    def sequences(first: int, last: int) -> tuple[Tensor, dict[str, Tensor]]:
        start, stop = sum(sizes[:first]), sum(sizes[:last])
        logprobs = batch.logprobs[start:stop].clone().requires_grad_()
        here = torch.tensor(sizes[first:last])
        tokens = TermTokens(
            index=torch.arange(stop - start),
            sequence=torch.repeat_interleave(torch.arange(len(here)), here),
            lengths=here.float(),
            held=here.long(),
            columns={name: column[start:stop] for name, column in batch.columns.items()},
        )
        stats = TokenStats(logprobs, batch.entropy[start:stop], None)
        share = objective(stats, {"policy": tokens}, {"policy": term}, {"policy": 0.7})
        share.loss.backward()
        assert logprobs.grad is not None
        return logprobs.grad, {"loss": share.loss.detach()} | share.sums["policy"]

    whole_grad, whole = sequences(0, 3)
    parts = [sequences(i, i + 1) for i in range(3)]
    torch.testing.assert_close(torch.cat([grad for grad, _ in parts]), whole_grad, rtol=1e-13, atol=0)
    assert whole_grad.any()
    for name, value in whole.items():
        assert sum(values[name].item() for _, values in parts) == pytest.approx(value.item(), rel=1e-12)


def test_every_term_with_rollout_logprobs_is_compared_whatever_it_reports() -> None:
    """The loss itself does not report the check. Log-probs are -1 and -2, the engine's -1.5 and -2; one token is no
    rollout."""

    def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
        return TermOutput(-stats.logprobs, {}, {}, {})

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    logprobs = column(-1.0, -2.0, -0.7)
    tokens = TermTokens(
        index=torch.arange(3),
        sequence=torch.zeros(3, dtype=torch.int64),
        lengths=column(3.0),
        held=torch.tensor([3]),
        columns={
            SCALE: column(1.0, 1.0, 1.0),
            "rollout_logprob": column(-1.5, -2.0, 0.0),
            "is_rollout": column(1.0, 1.0, 0.0),
        },
    )
    stats = TokenStats(logprobs.requires_grad_(), column(0.0, 0.0, 0.0), None)
    terms = {"new": Term(loss=loss, pool="new")}
    sums = objective(stats, {"new": tokens}, terms, {"new": 1.0}).sums["new"]
    factor = math.exp(0.5) - 1
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {
            "tokens": 2,
            "gap": 0.5,
            "gap_squared": 0.25,
            "factor": factor,
            "factor_squared": factor**2,
            "logit": 0,
        }
    )
    columns = {name: values for name, values in tokens.columns.items() if name != "rollout_logprob"}
    without = objective(stats, {"new": replace(tokens, columns=columns)}, terms, {"new": 1.0})
    assert without.sums == {"new": {}}
