"""Whole losses and gradients of methods, compared with the formulas of their authors' code, written anew.

docs/methods.md ("Compared with the authors' code") names the code. The formulas have its averages, and work on padded
batches [sequences, width] with a mask, as it does. Ours work on packed tokens. Both are in float64. Where the code has
another scale than ours, the settings or a factor that the docs state take it into account.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_chord.config import RunConfig
from megatron_chord.config_methods import SimpleWeight
from megatron_chord.losses.aggregate import ENTROPY_SCALE, SCALE, with_scales
from megatron_chord.losses.objective import objective
from megatron_chord.losses.policy import group_advantages
from megatron_chord.losses.terms import TermTokens, TokenStats
from megatron_chord.methods.prefix_rft import continuation_advantages
from megatron_chord.records import Part, TrainSample
from tests.support.tiny import terms_of, tiny_run

WIDTH = 16
"""Width of the padded batch, and the constant length (8192 in LUFFY's scripts)."""
LENGTHS = [3, 7, 16, 1, 9, 5, 12, 4]
IS_DEMONSTRATION = [False, False, True, False, True, False, False, True]


@dataclass
class Batch:
    """Padded numbers of all sequences: [B, WIDTH], and ``advantage`` [B, 1]. ``logp`` and ``entropy`` are leaves."""

    logp: Tensor
    entropy: Tensor
    old: Tensor
    advantage: Tensor
    mask: Tensor
    demonstration: Tensor
    """[B, 1], 1 for demonstrations"""
    kept: Tensor
    """Prefix-RFT: 1 for prefix tokens that are trained"""

    @property
    def rollouts(self) -> Tensor:
        return self.mask * (1 - self.demonstration)

    @property
    def demonstrations(self) -> Tensor:
        return self.mask * self.demonstration


def batch_of(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (len(LENGTHS), WIDTH)
    mask = np.arange(WIDTH)[None] < np.array(LENGTHS)[:, None]
    logp = np.minimum(rng.normal(-1.0, 1.0, shape), -1e-3)
    make = functools.partial(torch.tensor, dtype=torch.float64)
    return Batch(
        logp=make(logp).requires_grad_(),
        entropy=make(rng.uniform(0, 2, shape)).requires_grad_(),
        old=make(np.minimum(logp + rng.normal(0, 0.3, shape), -1e-3)),
        advantage=make(rng.normal(0, 1, (len(LENGTHS), 1))),
        mask=make(mask),
        demonstration=make(np.array(IS_DEMONSTRATION)[:, None]),
        kept=make(rng.integers(0, 2, shape)),
    )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]"""
    return ((values * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]


# ---- the authors' formulas


def ratio(b: Batch) -> Tensor:
    return torch.exp(b.logp - b.old)


def ppo(b: Batch, low: float = 0.2, high: float = 0.2) -> Tensor:
    r = ratio(b)
    return torch.maximum(-b.advantage * r, -b.advantage * torch.clamp(r, 1 - low, 1 + high))


def luffy(b: Batch) -> Tensor:
    p = torch.exp(b.logp)
    losses = torch.where(b.demonstration > 0, -b.advantage * p / (p + 0.1), -b.advantage * ratio(b))
    return (losses * b.mask).sum() / WIDTH - 0.001 * masked_mean(b.entropy, b.mask)


def rl_plus(b: Batch) -> Tensor:
    p, old = torch.exp(b.logp), torch.exp(b.old)
    mixture = p / (0.5 * (0.5 * old + 0.5) + 0.5 * old)
    focused = b.advantage * (1 - p.detach()) ** 0.5
    losses = torch.where(b.demonstration > 0, -focused * mixture, -b.advantage * ratio(b))
    return (losses * b.mask).sum() / WIDTH - 0.001 * masked_mean(b.entropy, b.mask)


def hpt(b: Batch) -> Tensor:
    policy = (-b.advantage * ratio(b) * b.rollouts).sum() / WIDTH
    sft = masked_mean(-b.logp, b.demonstrations)
    return policy + sft - 0.001 * masked_mean(b.entropy, b.mask)


def srft(b: Batch) -> Tensor:
    h = sequence_means(b.entropy.detach(), b.mask)
    own = torch.where(b.advantage > 0, -0.1 * torch.exp(h) * b.logp, b.logp)
    shown = -0.5 * torch.exp(-h) * b.logp - torch.exp(b.logp) * b.advantage
    return (
        masked_mean(own, b.rollouts)
        + masked_mean(shown, b.demonstrations)
        - 0.001 * masked_mean(b.entropy, b.mask)
    )


def dft(b: Batch) -> Tensor:
    return masked_mean(-torch.exp(b.logp).detach() * b.logp, b.demonstrations)


def chord(b: Batch, mu: float = 0.3) -> Tensor:
    p = torch.exp(b.logp).detach()
    return (1 - mu) * masked_mean(ppo(b), b.rollouts) + mu * masked_mean(
        -p * (1 - p) * b.logp, b.demonstrations
    )


def chord_by_sequence(b: Batch, mu: float = 0.3) -> Tensor:
    """ms-swift: GRPO with ratio 1 is a mean over sequences, SFT a mean over tokens."""
    on = (1 - b.demonstration)[:, 0]
    r = torch.exp(b.logp - b.logp.detach())
    policy = (sequence_means(-b.advantage * r, b.mask)[:, 0] * on).sum() / on.sum()
    return (1 - mu) * policy + mu * masked_mean(-b.logp, b.demonstrations)


def relift_sft(b: Batch) -> Tensor:
    return masked_mean(-b.logp, b.demonstrations) - 0.001 * masked_mean(b.entropy, b.demonstrations)


def dr_grpo(b: Batch) -> Tensor:
    """verl 0.8: the sum over tokens of each sequence, the mean over sequences, / a constant length."""
    return (ppo(b) * b.rollouts).sum(1).sum() / (1 - b.demonstration).sum() / WIDTH


def dapo(b: Batch) -> Tensor:
    return masked_mean(ppo(b, 0.2, 0.28), b.rollouts)


def gspo(b: Batch) -> Tensor:
    s = torch.exp(sequence_means((b.logp - b.old).detach(), b.mask))
    r = s * torch.exp(b.logp - b.logp.detach())
    losses = torch.maximum(-b.advantage * r, -b.advantage * torch.clamp(r, 1 - 3e-4, 1 + 4e-4))
    on = (1 - b.demonstration)[:, 0]
    return (sequence_means(losses, b.mask)[:, 0] * on).sum() / on.sum()


def cispo(b: Batch) -> Tensor:
    return masked_mean(-torch.clamp(ratio(b), 0, 5).detach() * b.advantage * b.logp, b.rollouts)


def prefix_rft(b: Batch) -> Tensor:
    """Demonstrations stand for prefixes: only kept tokens have an advantage; the ratio is that of the policy itself."""
    advantage = torch.where(b.demonstration > 0, b.advantage * b.kept, b.advantage)
    r = ratio(b)
    losses = torch.maximum(-advantage * r, -advantage * torch.clamp(r, 0.8, 1.2))
    losses = torch.where(advantage < 0, torch.minimum(losses, -advantage * 3.0), losses)
    return (losses * b.mask).sum() / len(LENGTHS) / WIDTH


# ---- ours


def ours(b: Batch, run: RunConfig, demonstrations: str, weights: dict[str, float]) -> Tensor:
    """The objective of the run's method over these sequences, packed into one micro-batch."""
    terms = terms_of(run)
    samples = []
    for row, (length, is_demonstration) in enumerate(zip(LENGTHS, IS_DEMONSTRATION, strict=True)):
        part = Part(
            term=demonstrations if is_demonstration else "policy",
            positions=np.arange(1, 1 + length),
            constants={"row": float(row)},
        )
        samples.append(TrainSample(token_ids=np.zeros(1 + length, np.int64), parts=(part,)))
    scaled = [sample.parts[0] for sample in with_scales(samples, terms)]
    place = b.mask.bool()
    index = place.flatten().nonzero()[:, 0]
    stats = TokenStats(b.logp.flatten()[index], b.entropy.flatten()[index], None)
    row_of = index // WIDTH
    tokens = {}
    for name in weights:
        rows = [row for row, part in enumerate(scaled) if part.term == name]
        mine = torch.isin(row_of, torch.tensor(rows)).nonzero()[:, 0]
        lengths = torch.tensor([LENGTHS[row] for row in rows])
        local = torch.tensor([place for place, length in enumerate(lengths.tolist()) for _ in range(length)])
        rows_of_tokens = row_of[mine]

        def column(values: Tensor, mine: Tensor = mine) -> Tensor:
            return values.expand(-1, WIDTH).flatten()[index][mine].detach()

        scales = {
            key: torch.tensor([scaled[row].constants[key] for row in rows], dtype=torch.float64)[local]
            for key in (SCALE, ENTROPY_SCALE)
            if key in scaled[rows[0]].constants
        }
        tokens[name] = TermTokens(
            index=mine,
            sequence=local,
            lengths=lengths.double(),
            held=lengths,
            columns={
                "advantage": column(b.advantage),
                "sign": column(b.advantage.sign()),
                "old_logprob": column(b.old),
                "rollout_logprob": column(b.old),
                "kept": column(b.kept),
                **scales,
            },
        )
        assert len(rows_of_tokens) == int(lengths.sum())
    return objective(stats, tokens, terms, weights).loss


SEQUENCES = len(LENGTHS)
SFT_WEIGHTS = {"policy": 0.7, "sft": 0.3}
BOTH = {"policy": 1.0, "demonstration": 1.0}
SUMS: dict[str, Any] = {"aggregation": "seq-mean-token-sum-norm"}
ALL_ENTROPY: dict[str, Any] = {"entropy_bonus_on": "all", "entropy_aggregation": "token-mean"}
UNCLIPPED: dict[str, Any] = {"surrogate": "unclipped", "ratio_from": "recomputed"}
ROLLOUTS = SEQUENCES - sum(IS_DEMONSTRATION)


@dataclass
class Case:
    theirs: Callable[[Batch], Tensor]
    method: str
    objective: dict[str, Any]
    weights: dict[str, float]
    settings: dict[str, Any] | None = None
    demonstrations: str = "sft"
    factor: float = 1.0
    """Theirs is this factor x ours: a sum / 8192 is not divided by the number of sequences."""


CASES: dict[str, Case] = {
    "CHORD, Trinity-RFT": Case(chord, "chord", {}, SFT_WEIGHTS),
    "CHORD, ms-swift": Case(
        chord_by_sequence,
        "chord",
        {"aggregation": "seq-mean-token-mean", "ratio_from": "current"},
        SFT_WEIGHTS,
        {"token_weight": SimpleWeight(kind="one")},
    ),
    "DFT": Case(dft, "chord", {}, {"sft": 1.0}, {"token_weight": SimpleWeight(kind="p")}),
    "Dr.GRPO": Case(dr_grpo, "chord", SUMS, {"policy": 1.0}),
    "DAPO": Case(dapo, "chord", {"clip_high": 0.28}, {"policy": 1.0}),
    "GSPO": Case(
        gspo,
        "chord",
        {
            "surrogate": "gspo",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "seq-mean-token-mean",
        },
        {"policy": 1.0},
    ),
    "CISPO": Case(cispo, "chord", {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0}, {"policy": 1.0}),
    "LUFFY": Case(
        luffy,
        "luffy",
        UNCLIPPED | SUMS | ALL_ENTROPY | {"entropy_bonus": 0.001 / SEQUENCES},
        BOTH,
        demonstrations="demonstration",
        factor=SEQUENCES,
    ),
    "RL-PLUS": Case(
        rl_plus,
        "rl_plus",
        UNCLIPPED | SUMS | ALL_ENTROPY | {"entropy_bonus": 0.001 / SEQUENCES},
        BOTH,
        demonstrations="demonstration",
        factor=SEQUENCES,
    ),
    "SRFT": Case(
        srft,
        "srft",
        ALL_ENTROPY | {"entropy_bonus": 0.001},
        BOTH,
        demonstrations="demonstration",
    ),
    "HPT": Case(
        hpt,
        "hpt",
        UNCLIPPED | SUMS | ALL_ENTROPY | {"entropy_bonus": 0.001 / ROLLOUTS},
        {"policy": 1.0, "sft": 1 / ROLLOUTS},
        {"branch_weights": "equal", "sft_coefficient": 1 / ROLLOUTS},
        factor=ROLLOUTS,
    ),
    "ReLIFT, SFT update": Case(relift_sft, "relift", {}, {"sft": 1.0}),
    "Prefix-RFT": Case(
        prefix_rft,
        "prefix_rft",
        SUMS | {"dual_clip": 3.0, "ratio_from": "recomputed"},
        {"policy": 1.0, "prefix": 1.0},
        demonstrations="prefix",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    case = CASES[name]
    run = tiny_run(Path("model"), method=case.method, settings=case.settings, **case.objective)
    run = replace(run, data=replace(run.data, max_response_tokens=WIDTH))
    their_batch, our_batch = batch_of(), batch_of()
    theirs = case.theirs(their_batch)
    mine = case.factor * ours(our_batch, run, case.demonstrations, case.weights)
    theirs.backward()
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    for expected, found in (
        (their_batch.logp.grad, our_batch.logp.grad),
        (their_batch.entropy.grad, our_batch.entropy.grad),
    ):
        zero = torch.zeros_like(their_batch.mask)
        torch.testing.assert_close(
            zero if found is None else found, zero if expected is None else expected, rtol=1e-12, atol=1e-15
        )
    assert their_batch.logp.grad is not None
    assert their_batch.logp.grad.abs().max() > 1e-3, "the formula has a gradient"


# ---- advantages


def grpo_advantages(rewards: Sequence[float], eps: float) -> list[float]:
    values = torch.tensor(rewards, dtype=torch.float64)
    return ((values - values.mean()) / (values.std() + eps)).tolist()


def test_advantages_of_a_group() -> None:
    """GHPO: std with 1e-4. Dr.GRPO, LUFFY: no std. RLOO: minus the mean of the others."""
    rewards = (1.0, 0.0, 0.5, 1.0)
    (ghpo,) = group_advantages([rewards], kind="group_std", eps=1e-4)
    assert ghpo == pytest.approx(grpo_advantages(rewards, 1e-4), rel=1e-12)
    (plain,) = group_advantages([rewards], kind="group_mean", eps=1e-6)
    assert plain == pytest.approx([r - 0.625 for r in rewards], rel=1e-12)
    (rloo,) = group_advantages([rewards], kind="leave_one_out", eps=1e-6)
    assert rloo == pytest.approx([r - (2.5 - r) / 3 for r in rewards], rel=1e-12)


def test_a_single_hybrid_of_prefix_rft_has_its_reward() -> None:
    """dr_grpo_prefix: a group of one has mean 0."""
    run = tiny_run(Path("model"), method="prefix_rft", advantage="group_mean")
    assert continuation_advantages([[1.0], [0.0], [1.0, 0.0]], run.objective) == [(1.0,), (0.0,), (0.5, -0.5)]
