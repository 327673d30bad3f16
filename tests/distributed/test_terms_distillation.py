"""Self-distillation equals a naive version in layouts that split sequences, vocabulary and batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.config import CorrectionConfig, KLConfig, RunConfig
from megatron_chord.config_methods import SelfDistillationConfig
from megatron_chord.records import Part, TrainSample
from tests.distributed.splits import assert_split_invariant
from tests.support.oracle import OracleTerm, SequenceTokens, Token
from tests.support.oracle_terms import policy_term
from tests.support.tiny import VOCAB, make_samples, save_qwen2, tiny_run

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"tp2_sp": {"tensor": 2, "sequence_parallel": True}, "cp2": {"context": 2}},
    4: {"pp2_dp2": {"pipeline": 2}},
}
MAX_RATIO, LIMIT = 1.5, 3.0


def test_every_layout_computes_the_reference_step(tmp_path: Path) -> None:
    model, reference = save_qwen2(tmp_path / "policy"), save_qwen2(tmp_path / "reference", seed=1)
    kl = KLConfig(estimator="k2", coefficient=0.05, reference=reference)
    assert_split_invariant(
        model,
        {
            "alone": case(model),
            "beside GRPO, initial teacher": case(
                model, weight=0.4, teacher="initial", divergence="jsd", kl=kl, temperature=0.8
            ),
            "nobody taught": untaught(case(model, weight=0.4)),
        },
        layouts=LAYOUTS,
        reference=reference,
    )


def test_the_teacher_of_a_later_update_has_the_weights_before_the_step(tmp_path: Path) -> None:
    model, old = save_qwen2(tmp_path / "policy"), save_qwen2(tmp_path / "old", seed=2)
    correction = CorrectionConfig(level="token", mode="truncate", high=1.2)
    objectives = {
        "recomputed": case(
            model, weight=0.7, divergence="forward_kl", ratio_from="recomputed", correction=correction
        )
    }
    assert_split_invariant(model, objectives, layouts={2: {"cp2": {"context": 2}}}, old=old)


def case(model: Path, **settings: Any) -> Any:
    settings = {"max_ratio": MAX_RATIO, "max_log_ratio": LIMIT, **settings}
    run = tiny_run(model, method="self_distillation", **settings)
    return run, taught_samples(), {"policy": 1.0}, {"policy": oracle_term(run)}


def untaught(objective: Any) -> Any:
    run, samples, weights, terms = objective
    alone = [
        replace(
            sample,
            parts=tuple(replace(part, constants={**part.constants, "taught": 0.0}) for part in sample.parts),
            teacher_ids=None,
        )
        for sample in samples
    ]
    return run, alone, weights, terms


def taught_samples() -> list[TrainSample]:
    """Three groups of three rollouts that share their prompt. Every third rollout has no teacher. The others of a group
    share their teacher's prompt, which is shorter or longer than their own, or each has one of its own."""
    rng = np.random.default_rng(8)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, VOCAB, count)

    samples = []
    for group, (own, teachers) in enumerate(((4, 17), (9, 2), (6, 11))):
        prompt, of_group = tokens(own), tokens(teachers)
        for member, sample in enumerate(make_samples(num_policy=3, num_sft=0, seed=group)):
            (part,) = sample.parts
            answer = sample.token_ids[part.positions[0] :]
            shown = of_group if group < 2 else tokens(teachers + member)
            positions = np.arange(own, own + len(answer))
            constants = {**part.constants, "taught": float(member < 2)}
            samples.append(
                TrainSample(
                    token_ids=np.concatenate([prompt, answer]),
                    parts=(Part(term="policy", positions=positions, constants=constants),),
                    teacher_ids=np.concatenate([shown, answer]) if member < 2 else None,
                )
            )
    return samples


def oracle_term(run: RunConfig) -> OracleTerm:
    """(1 - w) RL + w x taught x min(p / p_old, 1.5) x estimate, with u limited to [e^-3, e^3]."""
    objective, method = run.objective, run.method
    assert isinstance(method, SelfDistillationConfig)
    rl = policy_term(objective)

    def log_ratio(token: Token) -> float:
        if not token.constants["taught"]:
            return 0.0
        teacher = token.teacher_logp if method.teacher == "present" else token.reference_teacher_logp
        return max(-LIMIT, min(LIMIT, teacher - token.logp.item()))

    def weight(token: Token) -> float:
        old = token.constants["rollout_logprob"] if objective.ratio_from == "rollout" else token.old_logp
        return min(math.exp(max(-20.0, min(20.0, token.logp.item() - old))), MAX_RATIO)

    def corrected(token: Token) -> float:
        if objective.correction is None:
            return 1.0
        return min(math.exp(token.old_logp - token.constants["rollout_logprob"]), objective.correction.high)

    def estimate(token: Token) -> tuple[float, float]:
        u = math.exp(log_ratio(token))
        return {
            "reverse_kl": (u - 1 - math.log(u), -math.log(u)),
            "forward_kl": (u * math.log(u) - u + 1, 1 - u),
            "jsd": (
                (u * math.log(u) - (1 + u) * math.log((1 + u) / 2)) / 2,
                -math.log((1 + u) / 2) / 2,
            ),
        }[method.divergence]

    def distilled(token: Token) -> Tensor:
        value, slope = estimate(token)
        factor = token.constants["taught"] * weight(token) * corrected(token)
        return factor * (value + slope * (token.logp - token.logp.item()))

    def loss(token: Token, sequence: SequenceTokens, every: list[SequenceTokens]) -> Tensor:
        other = torch.zeros(()) if method.weight == 1 else rl.loss(token, sequence, every)
        return (1 - method.weight) * other + method.weight * distilled(token)

    return replace(
        rl,
        loss=loss,
        losses={**rl.losses, "distillation_loss": lambda token, *_: distilled(token).item()},
        means={
            **rl.means,
            "taught": lambda token, *_: token.constants["taught"],
            "teacher_log_ratio": lambda token, *_: log_ratio(token),
            "distillation_ratio": lambda token, *_: weight(token),
        },
    )
