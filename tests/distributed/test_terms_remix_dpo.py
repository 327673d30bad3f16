"""The terms of ReMix, DPO and DYPO equal naive versions in layouts that split sequences, vocabulary, batch, pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.config import KLConfig
from megatron_chord.config_methods import SimpleWeight
from megatron_chord.methods.dpo import Pair, pair_samples
from megatron_chord.records import Prompt, Rollout, TrainSample
from tests.distributed.splits import assert_split_invariant
from tests.support.oracle import OracleTerm, SequenceTokens, Token
from tests.support.oracle_terms import policy_term, sft_term
from tests.support.tiny import VOCAB, make_samples, save_qwen2, tiny_run

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": {"tensor": 2, "sequence_parallel": True}, "cp2": {"context": 2}},
    4: {"pp2_dp2": {"pipeline": 2}},
}
BETA = 0.2
KL = 0.05
CLIP = 0.2


def test_every_layout_computes_the_reference_step(tmp_path: Path) -> None:
    model, reference = save_qwen2(tmp_path / "policy"), save_qwen2(tmp_path / "reference", seed=1)
    assert_split_invariant(
        model, {"remix": remix(model, reference), "dpo": dpo(model)}, layouts=LAYOUTS, reference=reference
    )


def test_every_layout_computes_the_reference_step_of_dypo(tmp_path: Path) -> None:
    """Log-probs of whole answers are subtracted here, so rounding in FP32 is larger than in a mean over tokens."""
    model, reference = save_qwen2(tmp_path / "policy"), save_qwen2(tmp_path / "reference", seed=1)
    assert_split_invariant(
        model,
        {"dypo": dypo(model), "reference": dypo(model, reference=True, aggregation="seq-mean-token-mean")},
        layouts=LAYOUTS,
        reference=reference,
        relative=5e-5,
    )


def test_the_clip_of_stale_tokens_is_active_in_a_later_update(tmp_path: Path) -> None:
    model, reference = save_qwen2(tmp_path / "policy"), save_qwen2(tmp_path / "reference", seed=1)
    old = save_qwen2(tmp_path / "old", seed=2)
    objectives = {"remix": remix(model, reference)}
    assert_split_invariant(model, objectives, layouts={2: LAYOUTS[2]}, reference=reference, old=old)


# ---- ReMix


def remix(model: Path, reference: Path) -> Any:
    kl = KLConfig(estimator="k2", coefficient=KL, reference=reference)
    run = tiny_run(model, method="remix", kl=kl, aggregation="seq-mean-token-mean")
    fresh, stale = make_samples(num_policy=4, num_sft=0), make_samples(num_policy=5, num_sft=0, seed=1)
    samples = fresh + [as_stale(sample, age=1.0 + i % 2) for i, sample in enumerate(stale)]
    terms = {"policy": policy_term(run.objective), "stale": stale_term()}
    return run, samples, {"policy": 1.0, "stale": 1.0}, terms


def as_stale(sample: TrainSample, *, age: float) -> TrainSample:
    (part,) = sample.parts
    constants = {
        "advantage": part.constants["advantage"],
        "stale_logprob": part.constants["rollout_logprob"],
        "age": age,
    }
    return replace(sample, parts=(replace(part, term="stale", constants=constants),))


def stale_term() -> OracleTerm:
    """The clip is centred at pi_k / pi_{k-i}. In a step's first update this is the ratio itself, so nothing is
    clipped."""

    def ratio(token: Token) -> Tensor:
        return torch.exp(token.logp - token.constants["stale_logprob"])

    def is_clipped(token: Token) -> bool:
        a, r = token.constants["advantage"], ratio(token).item()
        centre = math.exp(token.old_logp - token.constants["stale_logprob"])
        return r > centre + CLIP if a > 0 else r < centre - CLIP

    def surrogate(token: Token) -> Tensor:
        a = token.constants["advantage"]
        centre = math.exp(token.old_logp - token.constants["stale_logprob"])
        edge = centre + CLIP if a > 0 else centre - CLIP
        return -(torch.tensor(edge, dtype=torch.float64) if is_clipped(token) else ratio(token)) * a

    def kl(token: Token) -> Tensor:
        return (token.reference_logp - token.logp) ** 2 / 2

    return OracleTerm(
        loss=lambda token, *_: surrogate(token) + KL * kl(token),
        pool="policy",
        aggregation="seq-mean-token-mean",
        means={
            "stale_ratio": lambda token, *_: ratio(token).item(),
            "stale_age": lambda token, *_: token.constants["age"],
            "stale_clip_fraction": lambda token, *_: float(is_clipped(token)),
            "stale_kl": lambda token, *_: kl(token).item(),
        },
        losses={"stale_loss": lambda token, *_: surrogate(token).item()},
    )


# ---- DPO


def dpo(model: Path) -> Any:
    run = tiny_run(model, method="dpo", settings={"beta": BETA})
    run = replace(run, batch=replace(run.batch, prompts=7))
    return run, pair_samples([random_pair(seed) for seed in range(6)]), {"dpo": 1.0}, {"dpo": dpo_term()}


def random_pair(seed: int) -> Pair:
    rng = np.random.default_rng(seed)

    def answer(*, has_logprobs: bool) -> Rollout:
        length = int(rng.integers(1, 14))
        return Rollout(
            token_ids=tuple(rng.integers(3, VOCAB, length).tolist()),
            logprobs=tuple(rng.normal(-6, 2, length).tolist()) if has_logprobs else (),
            finish_reason="stop",
            weight_version=0,
        )

    prompt = tuple(rng.integers(3, VOCAB, int(rng.integers(2, 9))).tolist())
    is_offpolicy = seed % 2 == 1
    return Pair(
        prompt=Prompt(id=str(seed), messages=(), truth="", token_ids=prompt),
        chosen=answer(has_logprobs=not is_offpolicy),
        rejected=answer(has_logprobs=True),
        is_offpolicy=is_offpolicy,
    )


def dpo_term() -> OracleTerm:
    """The first token of the chosen answer gets the whole loss of its pair. The factor 2 is there because a pair is two
    sequences."""

    def sides(token: Token, everything: list[SequenceTokens]) -> tuple[SequenceTokens, SequenceTokens]:
        pair = [s for s in everything if s.tokens[0].constants["pair"] == token.constants["pair"]]
        (chosen,) = [s for s in pair if s.tokens[0].constants["sign"] == 1]
        (rejected,) = [s for s in pair if s.tokens[0].constants["sign"] == -1]
        return chosen, rejected

    def margin(token: Token, everything: list[SequenceTokens]) -> Tensor:
        chosen, rejected = (
            torch.stack([t.logp - t.reference_logp for t in side.tokens]).sum()
            for side in sides(token, everything)
        )
        return BETA * (chosen - rejected)

    def stands_here(token: Token, everything: list[SequenceTokens]) -> bool:
        return token is sides(token, everything)[0].tokens[0]

    def loss(token: Token, _: SequenceTokens, everything: list[SequenceTokens]) -> Tensor:
        if not stands_here(token, everything):
            return torch.zeros((), dtype=torch.float64)
        return -2 * torch.log(torch.sigmoid(margin(token, everything)))

    def of_pair(number: Any) -> Any:
        def value(token: Token, _: SequenceTokens, everything: list[SequenceTokens]) -> float:
            return 2 * number(margin(token, everything).item()) if stands_here(token, everything) else 0.0

        return value

    def of_sampled(value: Callable[[float], float], token: Token, everything: list[SequenceTokens]) -> float:
        tokens = [t for sequence in everything for t in sequence.tokens]
        num_sampled = sum(t.constants["is_rollout"] == 1 for t in tokens)
        if token.constants["is_rollout"] == 0:
            return 0.0
        gap = abs(token.logp.item() - token.constants["rollout_logprob"])
        return value(gap) * len(tokens) / num_sampled

    return OracleTerm(
        loss=loss,
        pool="dpo",
        aggregation="seq-mean-token-sum",
        means={
            "entropy": lambda token, *_: token.entropy.item(),
            "logprob_gap": lambda token, _, everything: of_sampled(lambda gap: gap, token, everything),
            "probability_error": lambda token, _, everything: of_sampled(math.exp, token, everything),
        },
        losses={
            "dpo_loss": of_pair(lambda m: math.log(1 + math.exp(-m))),
            "dpo_margin": of_pair(lambda m: m),
            "dpo_accuracy": of_pair(lambda m: float(m > 0)),
        },
    )


# ---- DYPO


def dypo(model: Path, *, reference: bool = False, **objective: Any) -> Any:
    """Groups of 2 right and 1 wrong, of 1 and 3, and of right answers alone; and two demonstrations."""
    settings = {"beta": BETA, "alignment_coefficient": 0.3, "reference": reference}
    run = tiny_run(model, method="dypo", settings=settings, temperature=0.9, **objective)
    run = replace(run, batch=replace(run.batch, rollouts=4))
    signs = [(1, 1, -1), (1, -1, -1, -1), (1, 1)]
    places = [(g, m, sign) for g, of_group in enumerate(signs) for m, sign in enumerate(of_group)]
    samples = []
    for sample, (group, member, sign) in zip(
        make_samples(num_policy=9, num_sft=0, seed=6), places, strict=True
    ):
        (part,) = sample.parts
        added = {"group": float(group), "member": float(member), "sign": float(sign)}
        samples.append(replace(sample, parts=(replace(part, constants={**part.constants, **added}),)))
    samples += make_samples(num_policy=0, num_sft=2, seed=7)
    rl, found = policy_term(run.objective), dict[int, tuple[Tensor, float]]()

    def alignment(every: list[SequenceTokens]) -> tuple[Tensor, float]:
        """The loss, and the share of pairs in the right order. Both are means over groups of means over pairs."""
        losses: dict[int, list[Tensor]] = {}
        right: dict[int, list[float]] = {}
        for first, second in itertools.permutations(every, 2):
            one, two = first.tokens[0].constants, second.tokens[0].constants
            if one["group"] == two["group"] and (one["sign"], two["sign"]) == (1, -1):
                margin = BETA * (total_logprob(first) - total_logprob(second))
                losses.setdefault(int(one["group"]), []).append(torch.log(1 + torch.exp(-margin)))
                right.setdefault(int(one["group"]), []).append(float(margin.item() > 0))
        assert len(losses) == 2
        means = [sum(of_group) / len(of_group) for of_group in losses.values()]
        shares = [sum(of_group) / len(of_group) for of_group in right.values()]
        return torch.as_tensor(sum(means) / 2), sum(shares) / 2

    def total_logprob(sequence: SequenceTokens) -> Tensor:
        return torch.stack(
            [token.logp - (token.reference_logp if reference else 0.0) for token in sequence.tokens]
        ).sum()

    def of_step(every: list[SequenceTokens]) -> tuple[Tensor, float]:
        return found.setdefault(id(every), alignment(every) if id(every) not in found else found[id(every)])

    def loss(token: Token, sequence: SequenceTokens, every: list[SequenceTokens]) -> Tensor:
        # The scales of a pool add up to 1. So each token may have the whole alignment loss.
        return rl.loss(token, sequence, every) + 0.3 * of_step(every)[0]

    term = replace(
        rl,
        loss=loss,
        losses={
            **rl.losses,
            "alignment_loss": lambda token, sequence, every: of_step(every)[0].item(),
            "alignment_accuracy": lambda token, sequence, every: of_step(every)[1],
        },
    )
    return (
        run,
        samples,
        {"policy": 0.6, "sft": 0.4},
        {"policy": term, "sft": sft_term(SimpleWeight(kind="one"))},
    )
