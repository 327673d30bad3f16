"""DPO on mixed pairs makes the right pairs, and its loss per token equals the plain formula and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_chord.config import KLConfig
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.losses.preference import dpo_loss, dpo_term, pair_columns, pair_sums
from megatron_chord.losses.terms import TermTokens, TokenStats, empty_output
from megatron_chord.methods import dpo
from megatron_chord.methods.dpo import demonstration_pair, is_offpolicy, pair_samples, rollout_pair
from megatron_chord.methods.table import method_of
from megatron_chord.records import Grade, GradedRollouts, Prompt, Rollout, RolloutGroup, TrainSample
from megatron_chord.sampling.context import DrawnPrompt
from megatron_chord.schedules import ScheduleInput
from tests.support.tiny import tiny_run


def answer(*tokens: int, sampled: bool = True) -> Rollout:
    logprobs = tuple(-0.1 * token for token in tokens) if sampled else ()
    return Rollout(token_ids=tokens, logprobs=logprobs, finish_reason="stop", weight_version=0)


def group(*rewards: float, name: str = "q") -> RolloutGroup:
    """A group of answers with one token each: 10, 11, ..."""
    return RolloutGroup(
        prompt=Prompt(id=name, messages=(), truth="", token_ids=(5, 6)),
        rollouts=tuple(answer(10 + i) for i in range(len(rewards))),
        texts=("",) * len(rewards),
        rewards=rewards,
        advantages=(0.0,) * len(rewards),
    )


def demonstration(of: RolloutGroup, reward: float | None) -> GradedRollouts:
    return GradedRollouts(
        prompt=of.prompt,
        rollouts=(answer(90, 91, sampled=False),),
        texts=("",),
        grades=(Grade(score=reward, error=None if reward is not None else "timeout"),),
        rewards=(reward,),
    )


# ---- the pairs


@pytest.mark.parametrize(
    ("rewards", "chosen", "rejected"),
    [
        ((0.0, 1.0, 0.5), 11, 10),
        # The first of equal rollouts is taken.
        ((0.0, 1.0, 0.0, 1.0), 11, 10),
        ((1.0, 0.0, 1.0, -1.0), 10, 13),
    ],
)
def test_the_best_rollout_against_the_worst(rewards: Sequence[float], chosen: int, rejected: int) -> None:
    pair = rollout_pair(group(*rewards))
    assert pair is not None
    assert (pair.chosen.token_ids, pair.rejected.token_ids) == ((chosen,), (rejected,))
    assert not pair.is_offpolicy


def test_equal_rewards_give_no_pair() -> None:
    assert rollout_pair(group(1.0, 1.0)) is None


def test_the_demonstration_against_the_worst_rollout() -> None:
    of = group(0.5, 0.0, 0.5)
    pair = demonstration_pair(of, demonstration(of, 1.0))
    assert pair is not None
    assert (pair.chosen.token_ids, pair.rejected.token_ids) == ((90, 91), (11,))
    assert pair.is_offpolicy
    # Rollouts may all have equal rewards.
    all_wrong = group(0.0, 0.0)
    assert demonstration_pair(all_wrong, demonstration(all_wrong, 1.0)) is not None


@pytest.mark.parametrize("reward", [0.0, -1.0, None])
def test_a_demonstration_that_is_not_better_gives_no_pair(reward: float | None) -> None:
    of = group(1.0, 0.0)
    assert demonstration_pair(of, demonstration(of, reward)) is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0])
def test_the_share_of_off_policy_pairs_is_fixed(share: float) -> None:
    chosen = [is_offpolicy(position, share) for position in range(1000)]
    assert sum(chosen) == round(1000 * share)
    # The share is even: the number differs by at most one between windows.
    windows = {sum(chosen[start : start + 20]) for start in range(980)}
    assert max(windows) - min(windows) <= 1


def test_samples_of_the_pairs() -> None:
    first, second = group(1.0, 0.0), group(0.0, 0.0)
    pairs = [rollout_pair(first), demonstration_pair(second, demonstration(second, 1.0))]
    samples = pair_samples([pair for pair in pairs if pair is not None])
    assert [sample.token_ids.tolist() for sample in samples] == [
        [5, 6, 10],
        [5, 6, 11],
        [5, 6, 90, 91],
        [5, 6, 10],
    ]
    parts = [part for sample in samples for part in sample.parts]
    assert [part.positions.tolist() for part in parts] == [[2], [2], [2, 3], [2]]

    def column(name: str) -> list[Any]:
        return [part.constants[name] for part in parts]

    assert column("pair") == [0.0, 0.0, 1.0, 1.0]
    assert column("sign") == [1.0, -1.0, 1.0, -1.0]
    assert column("is_rollout") == [1.0, 1.0, 0.0, 1.0]
    assert [np.ravel(value).tolist() for value in column("rollout_logprob")] == [
        [-1.0],
        np.array([-1.1], np.float32).tolist(),
        [0.0],
        [-1.0],
    ]
    assert pair_samples([]) == []


def test_one_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rewards = {4: (1.0, 0.0), 5: (0.0, 0.0), 6: (1.0, 1.0), 7: (1.0, 0.0)}
    groups = [group(*found, name=str(position)) for position, found in rewards.items()]
    drawn = [
        DrawnPrompt(prompt=g.prompt, position=position) for g, position in zip(groups, rewards, strict=True)
    ]
    monkeypatch.setattr(
        dpo,
        "sample_groups",
        lambda context: SimpleNamespace(groups=groups, drawn=drawn, stats={"reward_mean": 0.5}),
    )
    asked: list[int] = []

    def demonstrations(drawn: Sequence[DrawnPrompt]) -> list[GradedRollouts]:
        asked.extend(item.position for item in drawn)
        return [demonstration(groups[item.position - 4], 1.0) for item in drawn]

    run = dpo_run(tmp_path)
    context: Any = SimpleNamespace(now=ScheduleInput(step=0), graded_demonstrations=demonstrations)
    collected = method_of(run).collect(context)
    # Pairs at odd positions are off-policy: 4 rollouts, 5 demonstration, 6 a tie, 7 demonstration.
    assert asked == [5, 7]
    assert [int(sample.parts[0].constants["is_rollout"]) for sample in collected.samples] == [
        1,
        1,
        0,
        1,
        0,
        1,
    ]
    assert collected.stats == {
        "reward_mean": 0.5,
        "dpo_pairs": 3,
        "dpo_offpolicy_pairs": 2,
        "dpo_skipped_prompts": 1,
    }
    assert collected.weights == {"dpo": 1.0}
    assert collected.memory is None


# ---- the loss


class Alone:
    """``AcrossRanks`` with a single rank."""

    def sum(self, values: Tensor) -> Tensor:
        return values.clone()

    def collect(self, values: Tensor) -> Tensor:
        return values


class Summing:
    """``AcrossRanks`` that adds another rank's contribution."""

    def __init__(self) -> None:
        self.contributions: list[Tensor] = []
        self.total: Tensor | None = None

    def sum(self, values: Tensor) -> Tensor:
        self.contributions.append(values)
        return values.clone() if self.total is None else self.total.clone()

    def collect(self, values: Tensor) -> Tensor:
        raise NotImplementedError


def batch_of(
    samples: Sequence[TrainSample], logprobs: Sequence[Tensor], reference: Sequence[Tensor]
) -> TermTokens:
    parts = [part for sample in samples for part in sample.parts]
    lengths = [len(part.positions) for part in parts]
    columns = {
        name: torch.cat(
            [
                torch.as_tensor(np.broadcast_to(part.constants[name], len(part.positions)).copy()).double()
                for part in parts
            ]
        )
        for name in parts[0].constants
    }
    columns |= {
        "old_logprob": torch.cat(list(logprobs)).detach(),
        "reference_logprob": torch.cat(list(reference)),
    }
    return TermTokens(
        index=torch.arange(sum(lengths)),
        sequence=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(lengths)),
        lengths=torch.tensor(lengths).float(),
        held=torch.tensor(lengths),
        columns=columns,
    )


@pytest.fixture
def pairs() -> tuple[list[TrainSample], list[Tensor], list[Tensor]]:
    """Three pairs of different lengths, one of them off-policy, with log-probs in float64."""
    prompt = Prompt(id="q", messages=(), truth="", token_ids=(5,))
    made = [
        dpo.Pair(prompt=prompt, chosen=answer(1, 2, 3), rejected=answer(4), is_offpolicy=False),
        dpo.Pair(
            prompt=prompt, chosen=answer(1, 2, sampled=False), rejected=answer(3, 4, 5), is_offpolicy=True
        ),
        dpo.Pair(prompt=prompt, chosen=answer(7), rejected=answer(8), is_offpolicy=False),
    ]
    samples = with_scales(pair_samples(made), {"dpo": dpo_term(beta=1.0, max_pairs=3)})
    generator = torch.Generator().manual_seed(0)

    def draw(sample: TrainSample) -> Tensor:
        return -5 * torch.rand(len(sample.token_ids) - 1, dtype=torch.float64, generator=generator)

    return samples, [draw(s).requires_grad_() for s in samples], [draw(s) for s in samples]


def plain_dpo(logprobs: Sequence[Tensor], reference: Sequence[Tensor], beta: float) -> Tensor:
    """Rafailov et al., eq. 7, over [chosen, rejected, chosen, rejected, ...]."""
    ratios = [p.sum() - q.sum() for p, q in zip(logprobs, reference, strict=True)]
    losses = [
        -torch.log(torch.sigmoid(beta * (c - r))) for c, r in zip(ratios[::2], ratios[1::2], strict=True)
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_value_and_gradient_are_those_of_the_plain_formula(pairs: Any, beta: float) -> None:
    samples, logprobs, reference = pairs
    expected = plain_dpo(logprobs, reference, beta)
    wanted = torch.autograd.grad(expected, logprobs)
    batch = batch_of(samples, logprobs, reference)
    (added,) = pair_columns([batch], Alone(), beta=beta, max_pairs=5)
    tokens = replace(batch, columns={**batch.columns, **added})
    output = dpo_loss(TokenStats(torch.cat(logprobs), torch.zeros_like(batch["scale"]), None), tokens)
    loss = (batch["scale"] * output.loss).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the columns are FP32
    for found, want in zip(torch.autograd.grad(loss, logprobs), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    ratios = [(p - q).sum().item() for p, q in zip(logprobs, reference, strict=True)]
    margins = [beta * (c - r) for c, r in zip(ratios[::2], ratios[1::2], strict=True)]
    totals = {name: (batch["scale"] * values).sum().item() for name, values in output.losses.items()}
    assert totals == {
        "dpo_loss": pytest.approx(expected.item(), rel=1e-6),
        "dpo_margin": pytest.approx(sum(margins) / 3, rel=1e-6),
        "dpo_accuracy": pytest.approx(sum(m > 0 for m in margins) / 3, rel=1e-6),
    }
    gaps = (torch.cat(logprobs) - batch["rollout_logprob"]).abs()[batch["is_rollout"] == 1]
    assert len(gaps) == 9  # two of the 11 tokens are the demonstration's
    assert output.means["logprob_gap"].mean().item() == pytest.approx(gaps.mean().item(), rel=1e-6)
    assert output.maxima["logprob_gap_max"].max().item() == pytest.approx(gaps.max().item(), rel=1e-6)


def test_one_pair_by_hand() -> None:
    # Chosen +0.5 above the reference, rejected -1.5: with beta 0.5 the margin is 1.
    # L = log(1 + e^-1) = 0.31326; dL/dl = -+ 0.5 sigma(-1) = -+ 0.13447.
    samples = with_scales(
        pair_samples(
            [
                dpo.Pair(
                    prompt=Prompt(id="q", messages=(), truth="", token_ids=(5,)),
                    chosen=answer(1, 2),
                    rejected=answer(3),
                    is_offpolicy=False,
                )
            ]
        ),
        {"dpo": dpo_term(beta=0.5, max_pairs=1)},
    )
    logprobs = [
        torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([-3.0], dtype=torch.float64, requires_grad=True),
    ]
    reference = [torch.tensor([-1.25, -2.25], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)]
    batch = batch_of(samples, logprobs, reference)
    (added,) = pair_columns([batch], Alone(), beta=0.5, max_pairs=1)
    tokens = replace(batch, columns={**batch.columns, **added})
    output = dpo_loss(TokenStats(torch.cat(logprobs), torch.zeros(3), None), tokens)
    loss = (batch["scale"] * output.loss).sum()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    chosen, rejected = torch.autograd.grad(loss, logprobs)
    assert chosen.tolist() == pytest.approx([-0.1344707] * 2, rel=1e-6)
    assert rejected.tolist() == pytest.approx([0.1344707], rel=1e-6)


def test_a_pair_may_lie_in_two_micro_batches_of_two_ranks(pairs: Any) -> None:
    samples, logprobs, reference = pairs
    whole = batch_of(samples, logprobs, reference)
    (expected,) = pair_columns([whole], Alone(), beta=0.3, max_pairs=4)
    starts = np.cumsum([0, *(len(p) for p in logprobs)])
    # Rank 0 has two micro-batches, rank 1 has one. No micro-batch has a whole pair.
    ranks = [[[0, 2], [5]], [[1, 3, 4]]]
    across, batches = [Summing(), Summing()], []
    for rank, mine in enumerate(ranks):
        here = [
            batch_of(*([values[i] for i in members] for values in (samples, logprobs, reference)))
            for members in mine
        ]
        batches.append(here)
        pair_columns(here, across[rank], beta=0.3, max_pairs=4)
    total = across[0].contributions[0] + across[1].contributions[0]
    for rank, mine in enumerate(ranks):
        across[rank].total = total
        added = pair_columns(batches[rank], across[rank], beta=0.3, max_pairs=4)
        for members, columns in zip(mine, added, strict=True):
            where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
            for name, values in columns.items():
                torch.testing.assert_close(values, expected[name][where])


def test_a_rank_without_tokens_takes_part(pairs: Any) -> None:
    nothing = torch.zeros(0)
    columns = ("pair", "sign", "is_rollout", "rollout_logprob", "old_logprob", "reference_logprob")
    empty = TermTokens(
        index=nothing.long(),
        sequence=nothing.long(),
        lengths=nothing,
        held=nothing.long(),
        columns=dict.fromkeys(columns, nothing),
    )
    across = Summing()
    (added,) = pair_columns([empty], across, beta=0.1, max_pairs=4)
    assert across.contributions[0].tolist() == [[0.0] * 4] * 3
    assert all(len(values) == 0 for values in added.values())


def test_at_the_reference_the_loss_is_log_2(pairs: Any) -> None:
    samples, logprobs, _ = pairs
    batch = batch_of(samples, logprobs, [p.detach() for p in logprobs])
    (added,) = pair_columns([batch], Alone(), beta=0.1, max_pairs=3)
    assert (batch["scale"] * added["loss_share"]).sum().item() == pytest.approx(math.log(2))
    assert added["accuracy_share"].sum().item() == 0


def test_what_it_reports() -> None:
    output = empty_output(dpo_term(beta=0.1, max_pairs=3))
    assert [*output.losses] == ["dpo_loss", "dpo_margin", "dpo_accuracy"]
    assert [*output.means, *output.maxima] == [
        "entropy",
        "logprob_gap",
        "probability_error",
        "logprob_gap_max",
    ]


# ---- refusals


def dpo_run(folder: Path, *, settings: Any = None, batch: Any = None, **objective: Any) -> Any:
    run = tiny_run(folder, method="dpo", settings=settings, **objective)
    return replace(run, data=replace(run.data, aligned=True), batch=replace(run.batch, **(batch or {})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"settings": {"beta": 0}}, r"method\.beta must be > 0"),
        ({"settings": {"offpolicy_share": 1.5}}, r"method\.offpolicy_share must lie in \[0, 1\]"),
        ({"batch": {"epochs": 2}}, "one update per step"),
        ({"batch": {"updates_per_step": 2}}, "one update per step"),
        ({"batch": {"sampling_attempts": 2}}, r"batch\.sampling_attempts above 1"),
        ({"clip_low": 0.1}, r"objective\.clip_low: method dpo does not use it"),
        ({"advantage": "group_mean"}, r"objective\.advantage: method dpo does not use it"),
        ({"kl": KLConfig()}, r"objective\.kl: method dpo does not use it"),
        ({"truncated": "mask"}, r"objective\.truncated: method dpo does not use it"),
        ({"clip_high": 0.5}, r"objective\.clip_high: method dpo does not use it"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(dpo_run(tmp_path, **settings))


def test_dynamic_sampling_goes_with_on_policy_pairs_alone(tmp_path: Path) -> None:
    method_of(dpo_run(tmp_path, settings={"offpolicy_share": 0.0}, batch={"sampling_attempts": 2}))


def test_it_needs_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.aligned"):
        method_of(tiny_run(tmp_path, method="dpo"))


def test_sequences_without_a_token_here_add_nothing() -> None:
    """On a context-parallel rank, the first and the last sequence (pairs 2 and 1) may have no token."""
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], dtype=torch.float64)
    sums = pair_sums(values, torch.tensor([0, 0, 2]), torch.tensor([0, 2, 1, 0]), 4)
    assert sums.tolist() == [[3.0, 0.0, 4.0, 0.0], [30.0, 0.0, 40.0, 0.0]]
    nothing = pair_sums(values[:0], torch.zeros(0, dtype=torch.long), torch.tensor([0, 0]), 2)
    assert nothing.tolist() == [[0.0, 0.0], [0.0, 0.0]]
