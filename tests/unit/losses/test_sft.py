"""Every token weight has the right value and is constant: the logit's gradient equals its closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chord.config_methods import (
    BernoulliEntropyWeight,
    ClippedISWeight,
    EntropyNormWeight,
    EntropyTopWeight,
    FocalWeight,
    MarginWeight,
    PowerWeight,
    SimpleWeight,
    TokenWeight,
    TrustRegionWeight,
)
from megatron_chord.losses.sft import TOKEN_WEIGHTS, sft_loss, sft_term, top_threshold
from megatron_chord.losses.terms import Term, TermOutput, TermTokens, TokenStats, empty_output
from tests.unit.methods.guided import push_on_target, tokens_of

PROBABILITIES = [
    1e-6,
    1e-3,
    0.01,
    0.05,
    0.1,
    0.2,
    0.23,
    0.24,
    1 / 3,
    0.39,
    0.41,
    0.5,
    0.7,
    0.9,
    0.99,
    1 - 1e-6,
]
ONE, P, PHI = SimpleWeight(kind="one"), SimpleWeight(kind="p"), SimpleWeight(kind="phi")
WEIGHTS = [
    ONE,
    P,
    PHI,
    PowerWeight(),
    PowerWeight(a=0.0, b=0.5, scale=2.0),
    ClippedISWeight(),
    TrustRegionWeight(),
    FocalWeight(),
    FocalWeight(exponent=0.5),
    BernoulliEntropyWeight(),
    EntropyTopWeight(),
    EntropyNormWeight(),
    MarginWeight(),
    MarginWeight(width=0.1),
]
LN2 = math.log(2)


def name_of(value: Any) -> str | None:
    return value.kind if hasattr(value, "kind") else None


def stats_of(p: Sequence[float], rivals: Sequence[float] | None = None) -> TokenStats:
    leaf = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    rival = None if rivals is None else torch.tensor(rivals, dtype=torch.float64).log()
    return TokenStats(leaf, torch.zeros_like(leaf), rival)


def grad_of(leaf: Tensor) -> list[float]:
    assert leaf.grad is not None
    return leaf.grad.tolist()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # p = 1/4 with a rival of 1/2, and p = 1/2 with a rival of 1/4: the margins are -1/4 and 1/4.
        (ONE, [1.0, 1.0]),
        (P, [0.25, 0.5]),
        (PHI, [3 / 16, 1 / 4]),
        (PowerWeight(a=2.0, b=0.5, scale=3.0), [3 / 16 * math.sqrt(0.75), 0.75 * math.sqrt(0.5)]),
        (PowerWeight(scale=4.0), [0.75, 1.0]),
        (PowerWeight(a=0.0, b=0.0, scale=2.0), [2.0, 2.0]),
        (ClippedISWeight(), [0.25, 0.0]),
        (ClippedISWeight(threshold=0.51), [0.25, 0.5]),
        (ClippedISWeight(threshold=1.0), [0.25, 0.5]),
        (TrustRegionWeight(), [1.0, 1.0]),
        (TrustRegionWeight(threshold=0.4), [0.625, 1.0]),
        (TrustRegionWeight(threshold=1.0), [0.25, 0.5]),
        (FocalWeight(), [9 / 16, 1 / 4]),
        (FocalWeight(exponent=0.5), [math.sqrt(0.75), math.sqrt(0.5)]),
        (FocalWeight(exponent=0.0), [1.0, 1.0]),
        (BernoulliEntropyWeight(), [0.5 * LN2 - 0.75 * math.log(0.75), LN2]),
        (MarginWeight(), [0.75, 0.75]),
        (MarginWeight(width=0.25), [math.exp(-0.5), math.exp(-0.5)]),
        (EntropyTopWeight(), [0.0, 1.0]),
        (EntropyNormWeight(), [0.0, 1.0]),
    ],
    ids=name_of,
)
def test_two_tokens_by_hand(weight: TokenWeight, expected: list[float]) -> None:
    stats = stats_of([0.25, 0.5], rivals=[0.5, 0.25])
    out = sft_loss(stats, tokens_of((2,), entropy_weight=[0.0, 1.0]), weight=weight)
    out.loss.sum().backward()
    losses = [expected[0] * 2 * LN2, expected[1] * LN2]
    assert out.loss.tolist() == pytest.approx(losses, rel=1e-13)
    assert grad_of(stats.logprobs) == pytest.approx([-w for w in expected], rel=1e-13)
    assert {name: values.tolist() for name, values in out.losses.items()} == {
        "sft_loss": pytest.approx(losses, rel=1e-13)
    }
    assert {name: values.tolist() for name, values in out.means.items()} == {
        "sft_nll": pytest.approx([2 * LN2, LN2]),
        "sft_p": pytest.approx([0.25, 0.5]),
        "sft_phi": pytest.approx([3 / 16, 1 / 4]),
        "token_weight": pytest.approx(expected, rel=1e-13),
    }
    assert out.maxima == {}
    assert not any(value.requires_grad for value in [*out.losses.values(), *out.means.values()])


@pytest.mark.parametrize(
    ("weight", "certain", "impossible"),
    [
        (ONE, 1.0, 1.0),
        (P, 1.0, 0.0),
        (PHI, 0.0, 0.0),
        (PowerWeight(), 0.0, 0.0),
        (PowerWeight(a=0.0, b=0.0, scale=2.0), 2.0, 2.0),
        (PowerWeight(a=0.5, b=0.5), 0.0, 0.0),
        (ClippedISWeight(), 0.0, 0.0),
        (ClippedISWeight(threshold=1.0), 1.0, 0.0),
        (TrustRegionWeight(), 1.0, 0.0),
        (FocalWeight(), 0.0, 1.0),
        (FocalWeight(exponent=0.5), 0.0, 1.0),
        (BernoulliEntropyWeight(), 0.0, 0.0),
        (MarginWeight(), 0.0, 0.0),
        (MarginWeight(width=1.0), math.exp(-0.5), math.exp(-0.5)),
        (EntropyTopWeight(), 1.0, 1.0),
    ],
    ids=name_of,
)
@pytest.mark.parametrize("cutoff", [1.0, 0.5])
def test_certain_and_impossible_tokens_are_finite(
    weight: TokenWeight, certain: float, impossible: float, cutoff: float
) -> None:
    # Cases: p = 1 with a rival of probability 0, and p = 0 in FP32 (-log p = 10000) with a certain rival.
    logprobs = torch.tensor([0.0, -1e4], requires_grad=True)
    stats = TokenStats(logprobs, torch.zeros(2), torch.tensor([-torch.inf, 0.0]))
    out = sft_loss(stats, tokens_of((2,), entropy_weight=1.0), weight=weight, cutoff=cutoff)
    out.loss.sum().backward()
    held = -certain * math.log(cutoff)
    assert out.loss.tolist() == pytest.approx([held, 1e4 * impossible], rel=1e-6)
    assert grad_of(logprobs) == pytest.approx(
        [-certain if cutoff == 1.0 else 0.0, -impossible], rel=1e-6, abs=0
    )


def of_weight(weight: TokenWeight, p: float) -> Callable[[TokenStats], TermOutput]:
    """Return the loss for the tokens of ``push_on_target``. The best other token has half of the remaining
    probability."""

    def loss(stats: TokenStats) -> TermOutput:
        rival = torch.tensor([(1 - p) / 2], dtype=torch.float64).log()
        return sft_loss(stats._replace(rival=rival), tokens_of(entropy_weight=0.7), weight=weight)

    return loss


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(
    ("weight", "oracle"),
    [
        (ONE, lambda p: 1 - p),
        (P, lambda p: p * (1 - p)),
        (PHI, lambda p: p * (1 - p) ** 2),
        (PowerWeight(a=0.5, b=3.0, scale=2.0), lambda p: 2 * p**0.5 * (1 - p) ** 4),
        (ClippedISWeight(), lambda p: p * (1 - p) if p <= 0.4 else 0.0),
        (TrustRegionWeight(), lambda p: p / max(p, 0.1) * (1 - p)),
        (FocalWeight(), lambda p: (1 - p) ** 3),
        (FocalWeight(exponent=0.5), lambda p: (1 - p) ** 1.5),
        (
            BernoulliEntropyWeight(),
            lambda p: (-p * math.log(p) - (1 - p) * math.log(1 - p)) * (1 - p),
        ),
        (MarginWeight(), lambda p: (1 - abs(p - (1 - p) / 2)) * (1 - p)),
        (MarginWeight(width=0.3), lambda p: math.exp(-((p - (1 - p) / 2) ** 2) / 0.18) * (1 - p)),
        (EntropyNormWeight(), lambda p: 0.7 * (1 - p)),
    ],
    ids=name_of,
)
def test_gradient_oracle(p: float, weight: TokenWeight, oracle: Callable[[float], float]) -> None:
    assert push_on_target(p, of_weight(weight, p)) == pytest.approx(oracle(p), rel=1e-9)


def test_phi_pushes_most_at_one_third() -> None:
    pushes = {p: push_on_target(p, of_weight(PHI, p)) for p in (0.32, 1 / 3, 0.35)}
    assert pushes[1 / 3] == pytest.approx(4 / 27, rel=1e-12) == max(pushes.values())


@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.01, 0.1, 0.2, 0.2355])
def test_phi_is_detached_so_the_gradient_raises_a_rare_demonstrated_token(p: float) -> None:
    def without_stop_gradient(stats: TokenStats) -> TermOutput:
        p = stats.logprobs.exp()
        return TermOutput(-p * (1 - p) * stats.logprobs, {}, {}, {})

    wrong = push_on_target(p, without_stop_gradient)
    assert wrong == pytest.approx(p * (1 - p) * ((1 - 2 * p) * math.log(p) + 1 - p), rel=1e-9)
    assert wrong < 0 < push_on_target(p, of_weight(PHI, p))
    # The sign changes at 0.2356. Above it the sign does not distinguish the two.
    assert push_on_target(0.2357, without_stop_gradient) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_with_ones_is_phi_to_the_bit(dtype: torch.dtype) -> None:
    p = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    results = []
    for weight in (PHI, PowerWeight(a=1.0, b=1.0, scale=1.0)):
        logprobs = torch.cat([p, torch.tensor([0.0, 1.0], dtype=dtype)]).clamp_min(1e-30).log()
        stats = TokenStats(logprobs.requires_grad_(), logprobs, None)
        out = sft_loss(stats, tokens_of((1002,)), weight=weight)
        out.loss.sum().backward()
        results.append((out.loss.detach(), logprobs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("weight", [ONE, P, PHI], ids=["one", "p", "phi"])
def test_no_push_above_the_cutoff(weight: SimpleWeight) -> None:
    cutoff = 0.6
    probabilities = [0.1, 0.59, 0.61, 0.9, 0.999]
    stats = stats_of(probabilities)
    out = sft_loss(stats, tokens_of((5,)), weight=weight, cutoff=cutoff)
    out.loss.sum().backward()
    weights = [{"one": 1.0, "p": p, "phi": p * (1 - p)}[weight.kind] for p in probabilities]
    # At the cutoff's log-prob, the loss keeps its weight from the token's own p.
    assert out.loss.tolist() == pytest.approx(
        [-w * math.log(min(p, cutoff)) for w, p in zip(weights, probabilities, strict=True)], rel=1e-13
    )
    grad = grad_of(stats.logprobs)
    assert grad[:2] == pytest.approx([-w for w in weights[:2]], rel=1e-13)
    assert grad[2:] == [0.0] * 3
    # The reported value is the token's own.
    assert out.means["sft_nll"].tolist() == pytest.approx([-math.log(p) for p in probabilities])
    assert out.means["token_weight"].tolist() == pytest.approx(weights)


def test_a_token_at_the_cutoff_is_still_pushed() -> None:
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    cutoff = logprobs.exp().item()
    sft_loss(TokenStats(logprobs, logprobs, None), tokens_of(), weight=ONE, cutoff=cutoff).loss.backward()
    assert grad_of(logprobs) == [-1.0]


class Ranks:
    """One rank, or one beside other ranks that hold ``theirs``."""

    def __init__(self, theirs: Sequence[float] = ()) -> None:
        self._theirs = torch.tensor(theirs)

    def sum(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def collect(self, values: Tensor) -> Tensor:
        return torch.cat([values, self._theirs.to(values.dtype)])


def scored(*batches: Sequence[float]) -> list[TermTokens]:
    return [tokens_of((len(entropies),), old_entropy=entropies) for entropies in batches]


def prepared(
    weight: TokenWeight, batches: Sequence[TermTokens], theirs: Sequence[float] = ()
) -> list[list[float]]:
    prepare = sft_term(weight=weight).prepare
    assert prepare is not None
    columns = prepare(batches, Ranks(theirs))
    assert all(set(names) == {"entropy_weight"} for names in columns)
    return [names["entropy_weight"].tolist() for names in columns]


@pytest.mark.parametrize(
    ("share", "theirs", "expected"),
    [
        # Of the entropies 0.1, 0.4 | 0.3, 0.2, 0.5, the top 2, 1 and 5 are kept.
        (0.4, [], [[0.0, 1.0], [], [0.0, 0.0, 1.0]]),
        (0.05, [], [[0.0, 0.0], [], [0.0, 0.0, 1.0]]),
        (1.0, [], [[1.0, 1.0], [], [1.0, 1.0, 1.0]]),
        # Other ranks hold the most uncertain tokens, or nearly all tokens, which are certain.
        (0.4, [0.9, 0.8, 0.7], [[0.0, 0.0], [], [0.0, 0.0, 1.0]]),
        (0.05, [0.9], [[0.0, 0.0], [], [0.0, 0.0, 0.0]]),
        (0.05, [0.0] * 95, [[1.0, 1.0], [], [1.0, 1.0, 1.0]]),
    ],
)
def test_the_most_uncertain_tokens_of_the_step(
    share: float, theirs: list[float], expected: list[list[float]]
) -> None:
    batches = scored([0.1, 0.4], [], [0.3, 0.2, 0.5])
    assert prepared(EntropyTopWeight(share=share), batches, theirs) == expected


@pytest.mark.parametrize(
    ("theirs", "mean"),
    [([], 0.3), ([0.6, 1.5], 3.6 / 7)],
)
def test_entropies_over_the_mean_of_the_step(theirs: list[float], mean: float) -> None:
    batches = scored([0.1, 0.4], [], [0.3, 0.2, 0.5])
    expected = [[0.1 / mean, 0.4 / mean], [], [0.3 / mean, 0.2 / mean, 0.5 / mean]]
    found = prepared(EntropyNormWeight(), batches, theirs)
    assert found == [pytest.approx(values, rel=1e-6) for values in expected]


@pytest.mark.parametrize("weight", [EntropyTopWeight(), EntropyNormWeight()], ids=name_of)
def test_nothing_to_prepare(weight: TokenWeight) -> None:
    assert prepared(weight, scored([], [])) == [[], []]
    assert prepared(weight, scored([]), theirs=[0.5]) == [[]]


@pytest.mark.parametrize(
    ("values", "share", "threshold"),
    [
        ([3.0, 1.0, 2.0], 1 / 3, 3.0),
        ([3.0, 1.0, 2.0], 0.34, 2.0),
        ([3.0, 1.0, 2.0], 1.0, 1.0),
        ([3.0, 1.0, 2.0], 1e-9, 3.0),
        ([7.0], 0.05, 7.0),
        # 0.07 x 100 is 7.000000000000001 in floating point. It must still be the 7th.
        ([float(i) for i in range(100)], 0.07, 93.0),
        ([float(i) for i in range(40)], 0.05, 38.0),
        ([float(i) for i in range(41)], 0.05, 38.0),
        # Equal entropies count separately: the second largest of 5, 5, 5, 1 is 5.
        ([5.0, 1.0, 5.0, 5.0], 0.5, 5.0),
        ([5.0, 1.0, 5.0, 5.0], 1.0, 1.0),
        ([], 0.5, math.inf),
    ],
)
def test_top_threshold(values: list[float], share: float, threshold: float) -> None:
    assert top_threshold(torch.tensor(values), share).item() == threshold


def test_tokens_that_tie_with_the_threshold_are_all_chosen() -> None:
    assert prepared(EntropyTopWeight(share=0.25), scored([5.0, 1.0], [5.0, 5.0])) == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("weight", WEIGHTS, ids=name_of)
def test_what_a_term_asks_for_and_reports(weight: TokenWeight) -> None:
    term: Term = sft_term(
        weight=weight, cutoff=0.9, pool="shared", aggregation="seq-mean-token-sum-norm", aggregation_length=7
    )
    by_entropy = weight.kind in ("entropy_top", "entropy_norm")
    assert (term.pool, term.aggregation, term.aggregation_length) == ("shared", "seq-mean-token-sum-norm", 7)
    assert term.scored == ({"old_entropy"} if by_entropy else set())
    assert (term.prepare is not None) == by_entropy
    assert term.rival == (weight.kind == "margin")
    names = empty_output(term)
    assert set(names.losses) == {"sft_loss"}
    assert set(names.means) == {"sft_nll", "sft_p", "sft_phi", "token_weight"}
    assert set(names.maxima) == set()


def test_every_kind_is_tried_here() -> None:
    assert {weight.kind for weight in WEIGHTS} == set(TOKEN_WEIGHTS)
