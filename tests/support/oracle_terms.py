"""The policy term and the SFT term for ``tests.support.oracle``, written from the papers, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_chord.config import ObjectiveConfig
from tests.support.oracle import OracleTerm, SequenceTokens, Token


def _old(token: Token, objective: ObjectiveConfig) -> float:
    return token.constants["rollout_logprob"] if objective.ratio_from == "rollout" else token.old_logp


def _ratio(token: Token, sequence: SequenceTokens, objective: ObjectiveConfig) -> Tensor:
    """Return the ratio, which is differentiable."""
    if objective.surrogate != "gspo":
        return torch.exp(torch.clamp(token.logp - _old(token, objective), -20, 20))
    gaps = [other.logp.item() - _old(other, objective) for other in sequence.tokens]
    return math.exp(sum(gaps) / len(gaps)) * token.logp.exp() / token.p


def _surrogate(
    token: Token, sequence: SequenceTokens, objective: ObjectiveConfig
) -> tuple[Tensor, bool, bool]:
    """Return the loss, whether the clip is active, and whether the dual clip is active."""
    a, ratio = token.constants["advantage"], _ratio(token, sequence, objective)
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if objective.surrogate == "unclipped":
        return -ratio * a, False, False
    if objective.surrogate == "cispo":
        r = ratio.item()
        return -min(max(r, low), high) * a * token.logp, not low <= r <= high, False
    is_clipped = (a > 0 and ratio.item() > high) or (a < 0 and ratio.item() < low)
    loss = torch.tensor(-a * (high if a > 0 else low), dtype=torch.float64) if is_clipped else -ratio * a
    c = objective.dual_clip
    if c is not None and a < 0 and ratio.item() > c:
        return torch.tensor(-a * c, dtype=torch.float64), is_clipped, True
    return loss, is_clipped, False


def _correction(token: Token, sequence: SequenceTokens, objective: ObjectiveConfig) -> tuple[float, bool]:
    """Return the weight, and whether it was cut or masked."""
    c = objective.correction
    if c is None:
        return 1.0, False
    gaps = [other.old_logp - other.constants["rollout_logprob"] for other in sequence.tokens]
    w = math.exp(
        {
            "token": token.old_logp - token.constants["rollout_logprob"],
            "sequence": max(-20.0, min(20.0, sum(gaps))),
            "geometric": sum(gaps) / len(gaps),
        }[c.level]
    )
    if c.mode == "truncate":
        return min(w, c.high), w > c.high
    outside = not c.low <= w <= c.high
    if c.mode == "clamp":
        return min(max(w, c.low), c.high), outside
    return 0.0 if outside else {"mask": w, "reject": 1.0}[c.mode], outside


def policy_term(objective: ObjectiveConfig, *, length: int = 1, pool: str = "policy") -> OracleTerm:
    """The policy branch of ``objective``. It reads the constants advantage and rollout_logprob."""

    def surrogate(token: Token, sequence: SequenceTokens) -> tuple[Tensor, bool, bool]:
        return _surrogate(token, sequence, objective)

    def weight(token: Token, sequence: SequenceTokens) -> tuple[float, bool]:
        return _correction(token, sequence, objective)

    def kl(token: Token) -> Tensor:
        assert objective.kl is not None
        d = token.reference_logp - token.logp
        return {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - 1 - d}[objective.kl.estimator]

    def loss(token: Token, sequence: SequenceTokens, _: list[SequenceTokens]) -> Tensor:
        value = surrogate(token, sequence)[0] * weight(token, sequence)[0]
        if objective.kl is not None:
            value = value + objective.kl.coefficient * kl(token)
        return value if objective.averages_entropy_apart else value - objective.entropy_bonus * token.entropy

    means: dict[str, Any] = {
        "entropy": lambda token, *_: token.entropy.item(),
        "clip_fraction": lambda token, sequence, _: float(surrogate(token, sequence)[1]),
        "logprob_gap": lambda token, *_: abs(token.logp.item() - token.constants["rollout_logprob"]),
        "probability_error": lambda token, *_: math.exp(
            abs(token.logp.item() - token.constants["rollout_logprob"])
        ),
    }
    if objective.dual_clip is not None:
        means["dual_clip_fraction"] = lambda token, sequence, _: float(surrogate(token, sequence)[2])
    if objective.correction is not None:
        means["correction_weight"] = lambda token, sequence, _: weight(token, sequence)[0]
        means["correction_outside"] = lambda token, sequence, _: float(weight(token, sequence)[1])
    if objective.kl is not None:
        means["kl"] = lambda token, *_: kl(token).item()
    return OracleTerm(
        loss=loss,
        pool=pool,
        aggregation=objective.aggregation,
        length=length,
        means=means,
        losses={
            "policy_loss": lambda token, sequence, _: (
                surrogate(token, sequence)[0].item() * weight(token, sequence)[0]
            )
        },
    )


def sft_term(
    weight: Any,
    *,
    cutoff: float = 1.0,
    pool: str = "sft",
    aggregation: str = "token-mean",
    length: int = 1,
    temperature: float = 1.0,
) -> OracleTerm:
    """The SFT branch: -w log p, where ``weight`` is a settings class of ``method.token_weight``."""

    def entropy_rank(token: Token, everything: list[SequenceTokens]) -> int:
        return sum(t.old_entropy > token.old_entropy for s in everything for t in s.tokens)

    def entropy_weight(token: Token, everything: list[SequenceTokens]) -> float:
        count = sum(len(sequence.tokens) for sequence in everything)
        if weight.kind == "entropy_top":
            return float(entropy_rank(token, everything) < max(1, math.ceil(weight.share * count)))
        return token.old_entropy * count / sum(t.old_entropy for s in everything for t in s.tokens)

    def w(token: Token, _: SequenceTokens, everything: list[SequenceTokens]) -> float:
        p, q = token.p, 1 - token.p
        margin = p - math.exp(token.rival)
        if weight.kind.startswith("entropy"):
            return entropy_weight(token, everything)
        if weight.kind == "margin":
            return 1 - abs(margin) if weight.width is None else math.exp(-(margin**2) / 2 / weight.width**2)
        return {
            "one": lambda: 1.0,
            "p": lambda: p,
            "phi": lambda: p * q,
            "power": lambda: weight.scale * p**weight.a * q**weight.b,
            "clipped_is": lambda: p if p <= weight.threshold else 0.0,
            "trust_region": lambda: p / max(p, weight.threshold),
            "focal": lambda: q**weight.exponent,
            "bernoulli_entropy": lambda: -p * math.log(p) - q * math.log(q),
        }[weight.kind]()

    def loss(token: Token, sequence: SequenceTokens, everything: list[SequenceTokens]) -> Tensor:
        is_cut = cutoff < 1 and token.p > cutoff
        logp = torch.tensor(math.log(cutoff), dtype=torch.float64) if is_cut else token.logp
        return -w(token, sequence, everything) * logp

    return OracleTerm(
        loss=loss,
        pool=pool,
        aggregation=aggregation,
        length=length,
        temperature=temperature,
        means={
            "sft_nll": lambda token, *_: -token.logp.item(),
            "sft_p": lambda token, *_: token.p,
            "sft_phi": lambda token, *_: token.p * (1 - token.p),
            "token_weight": w,
        },
        losses={"sft_loss": lambda token, sequence, every: loss(token, sequence, every).item()},
    )
