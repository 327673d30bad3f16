"""DYPO: how a prompt is trained, the weights of the branches, and the loss on all pairs of a group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.losses.aggregate import SCALE
from megatron_chord.losses.policy import policy_loss
from megatron_chord.losses.preference import alignment_columns
from megatron_chord.losses.terms import TermTokens, TokenStats
from megatron_chord.methods.dypo import dypo_loss
from megatron_chord.methods.table import method_of
from tests.support.scripted import ScriptedContext
from tests.support.tiny import terms_of, tiny_run
from tests.unit.methods.guided import assert_refused, tokens_of

DEMONSTRATIONS = {"a": (40, 41, 42), "b": (50, 51), "c": (60,)}
SCORES: dict[tuple[str, str], Any] = {
    ("", "a"): (0.0, 0.0, 0.0),
    ("", "b"): (1.0, 0.0, 1.0),
    ("", "c"): (1.0, 1.0, 1.0),
}
BETA = 0.3


def run_of(**changes: Any) -> RunConfig:
    run = tiny_run(Path("model"), method="dypo", **changes)
    return replace(
        run,
        data=replace(run.data, aligned=True),
        batch=replace(run.batch, rollouts=3, prompts=3, demonstrations=0),
    )


def collect(scores: dict[tuple[str, str], Any], **changes: Any) -> Any:
    run = run_of(**changes)
    context: Any = ScriptedContext(run=run, scores=scores, demonstrations=DEMONSTRATIONS)
    return method_of(run).collect(context)


def test_wrong_groups_are_imitated_right_ones_skipped_and_mixed_ones_trained_by_rl() -> None:
    collected = collect(SCORES, advantage="group_mean", settings={"sft_coefficient": 0.4})
    assert collected.weights == {"policy": 0.5, "sft": pytest.approx(0.2)}
    found = [
        (s.token_ids.tolist()[2:], s.parts[0].term, dict(s.parts[0].constants)) for s in collected.samples
    ]
    for _, _, constants in found[:3]:
        constants.pop("rollout_logprob")
    assert found == [
        ([20, 21], "policy", {"advantage": pytest.approx(1 / 3), "group": 0, "member": 0, "sign": 1}),
        ([30, 31], "policy", {"advantage": pytest.approx(-2 / 3), "group": 0, "member": 1, "sign": -1}),
        ([40, 41], "policy", {"advantage": pytest.approx(1 / 3), "group": 0, "member": 2, "sign": 1}),
        ([40, 41, 42], "sft", {}),
    ]
    assert collected.stats["sft_prompts"] == pytest.approx(1 / 3)
    assert collected.stats["skipped_prompts"] == pytest.approx(1 / 3)
    assert collected.stats["reward_mean"] == pytest.approx(5 / 9)


def test_steps_of_one_kind() -> None:
    assert collect(dict.fromkeys(SCORES, (0.0, 0.0, 0.0))).weights == {"policy": 0.0, "sft": 1.0}
    mixed = collect(dict.fromkeys(SCORES, (0.0, 1.0, 0.0)))
    assert mixed.weights == {"policy": 1.0, "sft": 0.0}
    assert [sample.parts[0].constants["group"] for sample in mixed.samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    nothing = collect(dict.fromkeys(SCORES, (1.0, 1.0, 1.0)))
    assert nothing.samples == []
    assert nothing.stats["skipped_prompts"] == 1


def test_a_failed_grading_is_in_no_pair() -> None:
    # Of b remain two right rollouts, so b is skipped.
    collected = collect(SCORES | {("", "b"): (1.0, None, 1.0)})
    assert [sample.parts[0].term for sample in collected.samples] == ["sft"]


# ---- the loss on pairs


class Together:
    """The ranks of the update, one after the other: each adds what the others have."""

    def __init__(self, others: Sequence[Tensor] = ()) -> None:
        self.others = others
        self.given: list[Tensor] = []

    def sum(self, values: Tensor) -> Tensor:
        self.given.append(values)
        return values + sum(self.others)

    def collect(self, values: Tensor) -> Tensor:
        raise NotImplementedError


GROUPS = [(0, 0, 1, 2), (0, 1, -1, 3), (0, 2, 1, 1), (1, 0, -1, 2), (1, 1, 1, 2), (2, 0, 1, 1), (2, 1, 1, 2)]
"""Group, place in it, +1 right or -1 wrong, and number of tokens of each answer. Group 2 has no pair."""


def answers(logprobs: Sequence[Tensor], chosen: Sequence[int], scale: float) -> TermTokens:
    def column(place: int) -> list[float]:
        return [GROUPS[i][place] for i in chosen for _ in range(GROUPS[i][3])]

    return tokens_of(
        [GROUPS[i][3] for i in chosen],
        group=column(0),
        member=column(1),
        sign=column(2),
        old_logprob=torch.cat([logprobs[i] for i in chosen]).tolist(),
        reference_logprob=[-1.0] * sum(GROUPS[i][3] for i in chosen),
        **{SCALE: scale},
    )


def columns(batches: Sequence[TermTokens], across: Together, *, with_reference: bool = False) -> Any:
    return alignment_columns(
        batches, across, beta=BETA, max_groups=4, max_members=3, with_reference=with_reference
    )


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5, 6]], [[6, 3, 0], [5, 1], [4, 2]]])
def test_value_and_gradient_are_those_of_the_mean_over_pairs(split: Any, with_reference: bool) -> None:
    """However the answers lie in micro-batches, value and gradient of the loss are those of the formula."""
    generator = torch.Generator().manual_seed(0)
    logprobs = [
        (-3 * torch.rand(size, generator=generator, dtype=torch.float64)).requires_grad_()
        for _, _, _, size in GROUPS
    ]
    shift = 1.0 if with_reference else 0.0
    losses: dict[int, list[Tensor]] = {}
    for one, two in itertools.permutations(range(len(GROUPS)), 2):
        if GROUPS[one][0] == GROUPS[two][0] and (GROUPS[one][2], GROUPS[two][2]) == (1, -1):
            margin = BETA * ((logprobs[one] + shift).sum() - (logprobs[two] + shift).sum())
            losses.setdefault(GROUPS[one][0], []).append(-torch.log(1 / (1 + torch.exp(-margin))))
    assert {group: len(pairs) for group, pairs in losses.items()} == {0: 2, 1: 1}
    exact = (sum(losses[0]) / 2 + losses[1][0]) / 2
    wanted = torch.autograd.grad(exact, logprobs, allow_unused=True)

    scale = 0.2
    batches = [answers([values.detach() for values in logprobs], chosen, scale) for chosen in split]
    added = columns(batches, Together(), with_reference=with_reference)
    total = torch.zeros((), dtype=torch.float64)
    value = accuracy = 0.0
    for chosen, batch, new in zip(split, batches, added, strict=True):
        found = {name: column.double() for name, column in new.items()}
        tokens = replace(batch, columns={**batch.columns, **found, "advantage": 0 * batch["sign"]})
        tokens = replace(tokens, columns={**tokens.columns, "rollout_logprob": tokens["old_logprob"]})
        stats = TokenStats(torch.cat([logprobs[i] for i in chosen]), torch.zeros(len(tokens.index)), None)
        output = dypo_loss(stats, tokens, ObjectiveConfig(), coefficient=2.0)
        total = total + (scale * output.loss).sum()
        value += (scale * output.losses["alignment_loss"]).sum().item()
        accuracy += (scale * output.losses["alignment_accuracy"]).sum().item()
    grads = torch.autograd.grad(total, logprobs, allow_unused=True)
    assert value == pytest.approx(exact.item(), rel=1e-6)
    assert total.item() == pytest.approx(2 * exact.item(), rel=1e-6)
    for grad, expected, (group, *_) in zip(grads, wanted, GROUPS, strict=True):
        assert grad is not None
        if group == 2:
            assert grad.abs().max() == 0
        else:
            assert expected is not None
            assert torch.allclose(grad, 2 * expected, rtol=1e-5)
    sums = [(values + shift).sum().item() for values in logprobs]
    assert accuracy == pytest.approx(
        ((sums[0] > sums[1]) / 2 + (sums[2] > sums[1]) / 2 + (sums[4] > sums[3])) / 2, rel=1e-6
    )


def test_a_pair_by_hand() -> None:
    # S = -1 and -2, beta 0.3: the margin is 0.3, and the slopes are -+ 0.3 sigmoid(-0.3).
    logprobs = [torch.tensor([-1.5, -0.5]), torch.tensor([-1.0])]
    tokens = tokens_of(
        (2, 1),
        group=[0, 0, 0],
        member=[1, 1, 0],
        sign=[-1, -1, 1],
        old_logprob=torch.cat(logprobs).tolist(),
    )
    (found,) = columns([tokens], Together())
    slope = 0.3 / (1 + math.exp(0.3))
    assert found["alignment_slope"].tolist() == pytest.approx([slope, slope, -slope])
    assert found["alignment_share"].tolist() == pytest.approx([math.log(1 + math.exp(-0.3)) / 3] * 3)
    assert found["alignment_accuracy_share"].tolist() == pytest.approx([1 / 3] * 3)


def test_a_pair_on_two_ranks() -> None:
    logprobs = [torch.full((size,), -0.1 * (i + 1)) for i, (*_, size) in enumerate(GROUPS)]
    whole = columns([answers(logprobs, range(7), 1.0)], Together())[0]
    split = [[0, 3, 5], [1, 2, 4, 6]]
    parts = [answers(logprobs, chosen, 1.0) for chosen in split]
    sent = [Together(), Together()]
    for part, rank in zip(parts, sent, strict=True):
        columns([part], rank)
    by_answer: dict[int, list[float]] = {}
    for chosen, part, other in zip(split, parts, sent[::-1], strict=True):
        slopes = columns([part], Together(other.given))[0]["alignment_slope"]
        for answer, values in zip(chosen, slopes.split([GROUPS[i][3] for i in chosen]), strict=True):
            by_answer[answer] = values.tolist()
    assert [value for i in range(7) for value in by_answer[i]] == pytest.approx(
        whole["alignment_slope"].tolist()
    )


def test_no_pair_gives_zeros() -> None:
    only = answers([torch.full((size,), -1.0) for *_, size in GROUPS], [5, 6], 1.0)
    for column in columns([only], Together())[0].values():
        assert column.tolist() == [0, 0, 0]


def test_with_coefficient_0_it_is_the_policy_loss() -> None:
    tokens = tokens_of(
        (2,),
        advantage=1.0,
        rollout_logprob=-0.7,
        alignment_share=0.5,
        alignment_slope=2.0,
        alignment_accuracy_share=0.5,
        **{SCALE: 0.5},
    )
    logprobs = torch.tensor([-0.5, -0.9], dtype=torch.float64, requires_grad=True)
    stats = TokenStats(logprobs, torch.zeros(2), None)
    found = dypo_loss(stats, tokens, ObjectiveConfig(), coefficient=0.0)
    assert torch.equal(found.loss, policy_loss(stats, tokens, ObjectiveConfig()).loss)


def test_terms() -> None:
    terms = terms_of(run_of())
    assert terms["policy"].scored == {"old_logprob"}
    assert terms["policy"].pool != terms["sft"].pool
    assert terms_of(run_of(reference=True))["policy"].scored == {
        "old_logprob",
        "reference_logprob",
    }


@pytest.mark.parametrize(
    ("settings", "batch", "reason"),
    [
        ({"beta": 0.0}, {}, "method.beta must be > 0"),
        ({"alignment_coefficient": -0.1}, {}, "method.alignment_coefficient must be >= 0"),
        ({"sft_coefficient": 0.0}, {}, "method.sft_coefficient must be > 0"),
        ({}, {"epochs": 2}, r"method dypo takes one update per step.*batch\.epochs is 2"),
        ({}, {"updates_per_step": 2}, r"batch\.updates_per_step is 2"),
        ({}, {"sampling_attempts": 2}, "dynamic sampling would replace the prompts"),
    ],
)
def test_refusals(settings: Any, batch: Any, reason: str) -> None:
    assert_refused(lambda: run_of(settings=settings), batch=batch, reason=reason)


def test_it_needs_demonstrations() -> None:
    run = run_of()
    with pytest.raises(ValueError, match="needs every prompt's own demonstration"):
        method_of(replace(run, data=replace(run.data, aligned=False)))
