"""The terms of Prefix-RFT, HPT and TRAPO equal naive versions in layouts that split sequences, vocabulary and batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_chord.config_methods import HPTConfig, TrustRegionWeight
from megatron_chord.methods.hpt import HPT
from megatron_chord.methods.prefix_rft import hybrid_sample
from megatron_chord.records import Part, Prompt, Rollout, TrainSample
from tests.distributed import steps
from tests.distributed.splits import assert_same_update, assert_split_invariant, case, with_layout
from tests.support.oracle import OracleTerm, SequenceTokens, Token, oracle_update
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, make_samples, save_qwen2, tiny_run

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": {"tensor": 2, "sequence_parallel": True}, "cp2": {"context": 2}},
    4: {"pp2_dp2": {"pipeline": 2}},
}
SHARE = 0.3


def test_every_layout_computes_the_reference_step(tmp_path: Path) -> None:
    model = save_qwen2(tmp_path)
    assert_split_invariant(
        model,
        {
            "prefix_rft": prefix_rft(model),
            "prefix_rft, recomputed": prefix_rft(
                model, ratio_from="recomputed", aggregation="seq-mean-token-mean"
            ),
            "prefix_rft, gspo": prefix_rft(model, surrogate="gspo", dual_clip=3.0, entropy_bonus=0.01),
            "hpt": hpt(model),
            "trapo": trapo(model),
        },
        layouts=LAYOUTS,
        absolute=1e-6,  # HPT's policy loss is a mean of terms that nearly cancel: off by 2.3e-7 on some processors
    )


def test_continuations_without_a_gradient_do_not_pass(tmp_path: Path) -> None:
    """Every other continuation has advantage 0. Its prefix is trained, and the update is that of the whole samples."""
    model = save_qwen2(tmp_path)
    cases, expected = [], []
    for run, whole, weights, terms in (prefix_rft(model), trapo(model)):
        samples = [
            replace(sample, parts=tuple(idle(part) if number % 2 else part for part in sample.parts))
            for number, sample in enumerate(whole)
        ]
        cases.append(case(with_layout(run, {}, 10_000), samples, weights, drops=True))
        metrics, grads = oracle_update(model, samples, terms, weights, temperature=run.rollout.temperature)
        expected.append(({"loss": metrics["loss"]}, grads))
    (results,) = run_ranks(steps.updates, 1, model, cases)
    for name, result, wanted in zip(("prefix_rft", "trapo"), results, expected, strict=True):
        assert_same_update(result, wanted, name)


def idle(part: Part) -> Part:
    """The part, with advantage 0 if it is sampled."""
    return replace(part, constants={**part.constants, "advantage": 0.0}) if part.term == "policy" else part


# ---- Prefix-RFT


def prefix_rft(model: Path, **objective: Any) -> Any:
    run = tiny_run(model, method="prefix_rft", settings={"entropy_share": SHARE}, **objective)
    samples = make_samples(num_policy=4, num_sft=0) + hybrids()
    terms = {"policy": policy_term(run.objective), "prefix": prefix_term(run.objective.aggregation)}
    return run, samples, {"policy": 1.0, "prefix": 1.0}, terms


def hybrids() -> list[TrainSample]:
    """Hybrid samples with prefixes and continuations of many lengths. One has no prefix, one is longer than most
    micro-batches."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, VOCAB, count).tolist())

    return [
        hybrid_sample(
            Prompt(id="", messages=(), truth="", token_ids=tokens(question)),
            tokens(prefix),
            Rollout(
                token_ids=tokens(continuation),
                logprobs=tuple(rng.normal(-6, 2, continuation).tolist()),
                finish_reason="stop",
                weight_version=0,
            ),
            prefix_advantage=float(rng.normal()),
            advantage=float(rng.normal()),
        )
        for question, prefix, continuation in ((3, 7, 4), (5, 1, 9), (2, 0, 5), (4, 21, 11), (6, 8, 1))
    ]


def prefix_term(aggregation: str) -> OracleTerm:
    """With a single update the ratio is p / sg(p), which is 1. Its gradient is that of log p."""

    def kept(token: Token, everything: list[SequenceTokens]) -> float:
        entropies = sorted((t.old_entropy for s in everything for t in s.tokens), reverse=True)
        return float(token.old_entropy >= entropies[math.ceil(SHARE * len(entropies)) - 1])

    def loss(token: Token, _: SequenceTokens, everything: list[SequenceTokens]) -> Tensor:
        return -token.logp.exp() / token.p * token.constants["advantage"] * kept(token, everything)

    return OracleTerm(
        loss=loss,
        pool="policy",
        aggregation=aggregation,
        means={
            "prefix_nll": lambda token, *_: -token.logp.item(),
            "prefix_entropy": lambda token, *_: token.entropy.item(),
            "prefix_kept": lambda token, _, everything: kept(token, everything),
            "prefix_clip_fraction": lambda *_: 0.0,
        },
        losses={"prefix_loss": lambda *all: loss(*all).item()},
    )


# ---- TRAPO


def trapo(model: Path) -> Any:
    """Prefixes with SFT's weight min(1, p / 0.02), and continuations, share one denominator."""
    weight = TrustRegionWeight(threshold=0.02)
    run = tiny_run(
        model,
        method="trapo",
        settings={"threshold": weight.threshold, "sft_coefficient": 0.7},
        aggregation="seq-mean-token-sum-norm",
        temperature=0.8,
    )
    length = run.data.max_response_tokens
    samples = make_samples(num_policy=4, num_sft=0) + [
        replace(sample, parts=(replace(sample.parts[0], term="sft", constants={}), *sample.parts[1:]))
        for sample in hybrids()
    ]
    terms = {
        "policy": policy_term(run.objective, length=length),
        "sft": sft_term(weight, pool="policy", aggregation=run.objective.aggregation, length=length),
    }
    return run, samples, {"policy": 1.0, "sft": 0.7}, terms


# ---- HPT


def hpt(model: Path) -> Any:
    """2 of 7 prompts use SFT: the loss is 5/7 of the mean over rollout tokens and 0.5 x 2/7 of that over demonstration
    tokens."""
    run = tiny_run(model, method="hpt", settings={"sft_coefficient": 0.5}, temperature=0.8)
    samples = make_samples(num_policy=10, num_sft=2, seed=4)
    weights = HPT(settings=HPTConfig(sft_coefficient=0.5)).weights([False] * 5 + [True] * 2)
    nll = OracleTerm(
        loss=lambda token, *_: -token.logp,
        pool="demonstrations",
        temperature=1.0,
        means={"sft_nll": lambda token, *_: -token.logp.item()},
        losses={"sft_loss": lambda token, *_: -token.logp.item()},
    )
    assert weights == {"policy": 1 - 2 / 7, "sft": 0.5 * 2 / 7}
    oracle = {"policy": replace(policy_term(run.objective), pool="rollouts"), "sft": nll}
    return run, samples, weights, oracle
