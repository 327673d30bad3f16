"""The terms of LUFFY, RL-PLUS and SRFT equal the oracle's in layouts that split sequences, vocabulary and batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.records import Part, TrainSample
from tests.distributed.splits import assert_split_invariant
from tests.support.oracle import OracleTerm, SequenceTokens, Token
from tests.support.oracle_terms import policy_term
from tests.support.tiny import VOCAB, save_qwen2, tiny_run

WEIGHTS = {"policy": 1.0, "demonstration": 1.0}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": {"tensor": 2, "sequence_parallel": True}, "cp2": {"context": 2}},
    4: {"pp2_dp2": {"pipeline": 2}},
}


def guided_samples(column: str, *, seed: int = 0) -> list[TrainSample]:
    """6 rollouts with ``column`` (advantage or sign) and 4 demonstrations with their advantage. All lengths differ."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(10):
        prompt, response = int(rng.integers(2, 9)), int(rng.integers(1, 14))
        value = float(rng.normal())
        constants: dict[str, float | np.ndarray] = {"advantage": value}
        if index < 6:
            constants = {
                column: value if column == "advantage" else math.copysign(1, value),
                "rollout_logprob": rng.normal(-6, 2, response).astype(np.float32),
            }
        part = Part(
            term="policy" if index < 6 else "demonstration",
            positions=np.arange(prompt, prompt + response),
            constants=constants,
        )
        samples.append(TrainSample(token_ids=rng.integers(3, VOCAB, prompt + response), parts=(part,)))
    return samples


def luffy(folder: Path, settings: dict[str, Any], **objective: Any) -> Any:
    run = tiny_run(folder, method="luffy", settings=settings, **objective)
    gamma = settings.get("gamma", 0.1) if settings.get("shaping", True) else None

    def ratio(token: Token) -> Tensor:
        x = torch.exp(token.logp)
        return x if gamma is None else x / (x + gamma)

    demonstration = OracleTerm(
        loss=lambda token, *_: -ratio(token) * token.constants["advantage"],
        pool="policy",
        aggregation=run.objective.aggregation,
        length=16,
        means={
            "demonstration_p": lambda token, *_: token.p,
            "demonstration_ratio": lambda token, *_: ratio(token).item(),
        },
        losses={"demonstration_loss": lambda token, *_: -ratio(token).item() * token.constants["advantage"]},
    )
    terms = {"policy": policy_term(run.objective, length=16), "demonstration": demonstration}
    return run, guided_samples("advantage"), WEIGHTS, terms


def rl_plus(folder: Path, **objective: Any) -> Any:
    run = tiny_run(folder, method="rl_plus", **objective)

    def ratio(token: Token) -> Tensor:
        omega = (math.exp(token.old_logp) + 1) / 2
        return 2 * torch.exp(token.logp) / (omega + math.exp(token.old_logp))

    def advantage(token: Token) -> float:
        return token.constants["advantage"] * math.sqrt(1 - token.p)

    demonstration = OracleTerm(
        loss=lambda token, *_: -ratio(token) * advantage(token),
        pool="policy",
        means={
            "demonstration_p": lambda token, *_: token.p,
            "demonstration_ratio": lambda token, *_: ratio(token).item(),
            "demonstration_focus": lambda token, *_: math.sqrt(1 - token.p),
        },
        losses={"demonstration_loss": lambda token, *_: -ratio(token).item() * advantage(token)},
    )
    terms = {"policy": policy_term(run.objective), "demonstration": demonstration}
    return run, guided_samples("advantage", seed=1), WEIGHTS, terms


def srft(folder: Path, **objective: Any) -> Any:
    run = tiny_run(folder, method="srft", **objective)

    def entropy(sequence: SequenceTokens) -> float:
        return sum(token.entropy.item() for token in sequence.tokens) / len(sequence.tokens)

    def of_rollout(token: Token, sequence: SequenceTokens, _: list[SequenceTokens]) -> Tensor:
        if token.constants["sign"] > 0:
            return -0.1 * math.exp(entropy(sequence)) * token.logp
        return token.logp

    def imitation(token: Token, sequence: SequenceTokens, _: list[SequenceTokens]) -> Tensor:
        return -0.5 * math.exp(-entropy(sequence)) * token.logp

    def reinforcement(token: Token) -> Tensor:
        return -token.constants["advantage"] * torch.exp(token.logp)

    terms = {
        "policy": OracleTerm(
            loss=of_rollout,
            pool="rollouts",
            aggregation=run.objective.aggregation,
            means={
                "entropy": lambda token, *_: token.entropy.item(),
                "logprob_gap": lambda token, *_: abs(token.logp.item() - token.constants["rollout_logprob"]),
                "probability_error": lambda token, *_: math.exp(
                    abs(token.logp.item() - token.constants["rollout_logprob"])
                ),
                "right_fraction": lambda token, *_: float(token.constants["sign"] > 0),
                "right_weight": lambda token, sequence, _: 0.1 * math.exp(entropy(sequence)),
            },
            losses={"policy_loss": lambda *token: of_rollout(*token).item()},
        ),
        "demonstration": OracleTerm(
            loss=lambda *token: imitation(*token) + reinforcement(token[0]),
            pool="demonstrations",
            aggregation=run.objective.aggregation,
            means={
                "demonstration_p": lambda token, *_: token.p,
                "demonstration_entropy": lambda token, *_: token.entropy.item(),
                "demonstration_weight": lambda token, sequence, _: 0.5 * math.exp(-entropy(sequence)),
            },
            losses={
                "demonstration_sft_loss": lambda *token: imitation(*token).item(),
                "demonstration_rl_loss": lambda token, *_: reinforcement(token).item(),
            },
        ),
    }
    return run, guided_samples("sign", seed=2), WEIGHTS, terms


def test_terms_with_demonstrations(tmp_path: Path) -> None:
    model = save_qwen2(tmp_path)
    objectives = {
        "luffy": luffy(model, {}, surrogate="unclipped"),
        "luffy: unshaped, a constant denominator": luffy(
            model, {"shaping": False}, aggregation="seq-mean-token-sum-norm"
        ),
        "luffy: means of sequences": luffy(model, {"gamma": 0.01}, aggregation="seq-mean-token-mean"),
        "rl_plus": rl_plus(model, surrogate="unclipped"),
        "rl_plus: recomputed": rl_plus(model, ratio_from="recomputed"),
        "srft": srft(model),
        "srft: means of sequences": srft(model, aggregation="seq-mean-token-mean"),
    }
    assert_split_invariant(model, objectives, layouts=LAYOUTS)
