"""A batch has one broken token: p slightly above 1 by rounding, a log-prob of -inf, or NaN.

Either all values and gradients are finite, or the loss is not, which stops the update. NaN is never left out or
replaced by 0 or 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_chord.config import CorrectionConfig, KLConfig, ObjectiveConfig
from megatron_chord.config_methods import SelfDistillationConfig, SimpleWeight, TokenWeight
from megatron_chord.losses.aggregate import SCALE
from megatron_chord.losses.objective import objective
from megatron_chord.losses.policy import policy_loss
from megatron_chord.losses.sft import most_uncertain, sft_term
from megatron_chord.losses.terms import Term, TermTokens, TokenStats
from megatron_chord.methods.dypo import dypo_loss
from megatron_chord.methods.luffy import shaped_loss
from megatron_chord.methods.prefix_rft import prefix_loss
from megatron_chord.methods.remix import stale_loss
from megatron_chord.methods.rl_plus import mixture_loss
from megatron_chord.methods.self_distillation import self_distillation_loss
from megatron_chord.methods.srft import imitation_loss, signed_loss
from megatron_chord.train.update import largest

ABOVE_1 = math.log1p(torch.finfo(torch.float32).eps)
BROKEN = {"above 1": ABOVE_1, "-inf": -math.inf, "NaN": math.nan}
SIZES = (3, 1)
PLACE = 1
"""The broken token. The first sequence has a good token on each side of it."""

POLICIES = {
    f"{surrogate} {ratio_from} {correction} {dual_clip} {kl}": ObjectiveConfig(
        surrogate=surrogate,
        ratio_from=ratio_from,
        correction=correction and CorrectionConfig(level=correction[0], mode=correction[1], high=2.0),
        dual_clip=dual_clip,
        kl=kl and KLConfig(estimator=kl),
    )
    for surrogate, ratio_from, correction, dual_clip, kl in itertools.product(
        ("ppo", "gspo", "cispo", "unclipped"),
        ("rollout", "current", "recomputed"),
        (
            None,
            *itertools.product(("token", "sequence", "geometric"), ("truncate", "clamp", "mask", "reject")),
        ),
        (None, 3.0),
        (None, "k1", "k2", "k3"),
    )
    if not (correction and ratio_from == "rollout")
    if not (dual_clip and surrogate in ("cispo", "unclipped"))
    # KL is only added to the loss, so one case with each surrogate is enough.
    if kl is None or (correction is None and ratio_from == "recomputed" and dual_clip is None)
}
WEIGHTS: list[TokenWeight] = [
    *(SimpleWeight(kind=kind) for kind in ("one", "p", "phi")),
    *(kind() for kind in get_args(TokenWeight) if kind is not SimpleWeight),
    *(kind(exponent=0.5) for kind in get_args(TokenWeight) if kind.__name__ == "FocalWeight"),
    *(kind(a=0.5, b=0.5) for kind in get_args(TokenWeight) if kind.__name__ == "PowerWeight"),
]
OTHERS: dict[str, Callable[[TokenStats, TermTokens], Any]] = {
    "luffy": lambda stats, tokens: shaped_loss(stats, tokens, gamma=0.1),
    "luffy unshaped": lambda stats, tokens: shaped_loss(stats, tokens, gamma=None),
    "rl_plus": lambda stats, tokens: mixture_loss(stats, tokens, gamma=0.5, ratio_from="current"),
    "srft rollouts": lambda stats, tokens: signed_loss(stats, tokens, coefficient=0.1),
    "srft demonstrations": lambda stats, tokens: imitation_loss(stats, tokens, coefficient=0.5),
    "prefix_rft": lambda stats, tokens: prefix_loss(stats, tokens, ObjectiveConfig()),
    "remix": lambda stats, tokens: stale_loss(stats, tokens, ObjectiveConfig()),
    "dypo": lambda stats, tokens: dypo_loss(stats, tokens, ObjectiveConfig(), coefficient=0.1),
    **{
        f"self_distillation {divergence} {weight}": lambda stats, tokens, divergence=divergence, weight=weight: (
            self_distillation_loss(
                stats,
                tokens,
                ObjectiveConfig(),
                SelfDistillationConfig(divergence=divergence, weight=weight),
            )
        )
        for divergence, weight in itertools.product(("reverse_kl", "forward_kl", "jsd"), (1.0, 0.5))
    },
}


def tokens_of(advantage: float, **columns: Tensor) -> TermTokens:
    count = sum(SIZES)
    constants = {
        SCALE: 0.25,
        "advantage": advantage,
        "rollout_logprob": -0.7,
        "stale_logprob": -0.7,
        "old_logprob": -0.6,
        "reference_logprob": -0.5,
        "entropy_weight": 0.5,
        "sign": advantage,
        "kept": 1.0,
        "age": 1.0,
        "taught": 1.0,
        "teacher_logprob": -0.4,
        "alignment_share": 0.1,
        "alignment_slope": -0.2,
        "alignment_accuracy_share": 0.1,
    }
    sequence = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    return TermTokens(
        index=torch.arange(count),
        sequence=sequence,
        lengths=torch.tensor(SIZES, dtype=torch.float32),
        held=torch.tensor(SIZES),
        columns={name: torch.full((count,), value) for name, value in constants.items()} | columns,
    )


def outcome(term: Term, broken: float, tokens: TermTokens) -> tuple[float, Tensor]:
    """Return the loss and the gradient of the log-probs."""
    logprobs = torch.tensor([-0.5, broken, -0.9, -0.3], requires_grad=True)
    entropy = torch.tensor([0.5, 0.0, 0.7, 0.2], requires_grad=True)
    stats = TokenStats(logprobs, entropy, torch.tensor([-1.0, -2.0, -1.5, -3.0]))
    share = objective(stats, {"term": tokens}, {"term": term}, {"term": 1.0})
    share.loss.backward()
    assert logprobs.grad is not None
    return share.loss.item(), logprobs.grad


def assert_told(term: Term, advantages: Sequence[float] = (1.0, -1.0), *, finite: Sequence[str]) -> None:
    for (name, broken), advantage in itertools.product(BROKEN.items(), advantages):
        loss, grad = outcome(term, broken, tokens_of(advantage))
        if name in finite:
            assert math.isfinite(loss), name
        if name == "NaN":
            assert math.isnan(loss)
        elif math.isfinite(loss):
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("cutoff", [1.0, 0.5])
def test_demonstration_tokens(weight: TokenWeight, cutoff: float) -> None:
    term = sft_term(weight=weight, cutoff=cutoff)
    # At p = 0 these weights are 0. The other weights make the loss of an impossible token infinite.
    zero_at_0 = weight.kind in (
        "p",
        "phi",
        "power",
        "clipped_is",
        "trust_region",
        "bernoulli_entropy",
    )
    assert_told(term, (1.0,), finite=("above 1", "-inf") if zero_at_0 else ("above 1",))
    for name in ("above 1", "-inf"):
        assert outcome(term, BROKEN[name], tokens_of(1.0))[1].isfinite().all(), name


def test_every_policy_objective() -> None:
    assert len(POLICIES) > 150
    for name, settings in POLICIES.items():
        term = Term(
            loss=lambda stats, tokens, settings=settings: policy_loss(stats, tokens, settings), pool="p"
        )
        try:
            assert_told(term, finite=("above 1",))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods(name: str) -> None:
    assert_told(Term(loss=OTHERS[name], pool="p"), finite=("above 1",))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clamp", "mask", "reject"])
def test_a_constant_that_is_nan_is_told_too(level: Any, mode: Any) -> None:
    """The NaN comes from the rollout engine, or from the forward pass before the update."""
    for column in ("rollout_logprob", "old_logprob"):
        settings = ObjectiveConfig(
            ratio_from="recomputed", correction=CorrectionConfig(level=level, mode=mode, high=2.0)
        )
        term = Term(
            loss=lambda stats, tokens, settings=settings: policy_loss(stats, tokens, settings), pool="p"
        )
        values = torch.full((4,), -0.6)
        values[PLACE] = math.nan
        assert math.isnan(outcome(term, -0.5, tokens_of(1.0, **{column: values}))[0]), column


class Alone:
    def sum(self, values: Tensor) -> Tensor:
        return values

    def collect(self, values: Tensor) -> Tensor:
        return values


def test_an_entropy_that_is_nan_chooses_no_tokens() -> None:
    entropy = torch.tensor([0.5, math.nan, 0.7, 0.2])
    columns: list[Mapping[str, Tensor]] = list(
        most_uncertain("kept", 0.5)([tokens_of(1.0, old_entropy=entropy)], Alone())
    )
    assert columns[0]["kept"].isnan().all()


def test_the_maximum_over_ranks_is_nan_if_one_rank_has_nan() -> None:
    for values in ([math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]):
        assert math.isnan(largest(values))
    assert largest([1.0, 3.0, 2.0]) == 3.0
