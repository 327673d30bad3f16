"""One optimizer update with Transformers in float64: one sample at a time, with full logits and plain loops.

It does not use the package's losses. Its formulas are those of the papers, token by token. Constants (old log-probs,
weights, advantages) are numbers. What is differentiated is a 0-dimensional tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.records import TrainSample


@dataclass(kw_only=True)
class Token:
    """One trained token."""

    logp: Tensor
    """Differentiable."""
    entropy: Tensor
    """Differentiable."""
    rival: float
    """The log-prob of the best other token."""
    constants: dict[str, float]
    old_logp: float
    """The log-prob by the policy before the update. In a single update from the same weights it equals ``logp``."""
    old_entropy: float
    reference_logp: float = math.nan
    teacher_logp: float = math.nan
    """After the teacher's prompt, by the policy before the update."""
    reference_teacher_logp: float = math.nan

    @property
    def p(self) -> float:
        return math.exp(self.logp.item())


@dataclass(kw_only=True)
class SequenceTokens:
    """The trained tokens of one part of a sample."""

    term: str
    tokens: list[Token]


@dataclass(kw_only=True)
class OracleTerm:
    """A term of the loss. ``loss(token, its sequence, all of the term's sequences)`` returns a tensor.

    ``means`` and ``losses`` are further numbers that the trainer reports.
    """

    loss: Callable[[Token, SequenceTokens, list[SequenceTokens]], Tensor]
    pool: str
    aggregation: str = "token-mean"
    length: int = 1
    entropy_bonus: float = 0.0
    """Coefficient of the entropy that is averaged apart, over the tokens of all terms that have one."""
    entropy_aggregation: str = "token-mean"
    temperature: float | None = None
    means: Mapping[str, Callable[[Token, SequenceTokens, list[SequenceTokens]], float]] = field(
        default_factory=dict[str, Callable[[Token, SequenceTokens, list[SequenceTokens]], float]]
    )
    losses: Mapping[str, Callable[[Token, SequenceTokens, list[SequenceTokens]], float]] = field(
        default_factory=dict[str, Callable[[Token, SequenceTokens, list[SequenceTokens]], float]]
    )


def oracle_update(
    folder: Path,
    samples: Sequence[TrainSample],
    terms: Mapping[str, OracleTerm],
    weights: Mapping[str, float],
    *,
    temperature: float = 1.0,
    reference: Path | None = None,
    old: Path | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the loss with its metrics, and the gradients by Hugging Face name.

    ``old`` is the folder of the policy before the step's first update.
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )

    model = load(folder)
    other = load(reference) if reference is not None else None
    before = load(old) if old is not None else model
    found: dict[str, list[SequenceTokens]] = defaultdict(list)
    for sample in samples:
        shift = 0 if sample.teacher_ids is None else len(sample.teacher_ids) - len(sample.token_ids)
        for part in sample.parts:
            own = terms[part.term].temperature
            divided = temperature if own is None else own
            logps = _log_softmax(model, sample, divided)
            earlier = _log_softmax(before, sample, divided).detach()
            theirs = _log_softmax(other, sample, divided).detach() if other is not None else None
            taught = _teacher_log_softmax(before, sample, divided)
            taught_by_other = _teacher_log_softmax(other, sample, divided)
            tokens = []
            for k, position in enumerate(part.positions.tolist()):
                row, target = logps[position - 1], int(sample.token_ids[position])
                others = torch.cat([row[:target], row[target + 1 :]])
                entropy = -(row.exp() * row).sum()
                tokens.append(
                    Token(
                        logp=row[target],
                        entropy=entropy,
                        rival=others.max().item(),
                        constants={
                            name: float(np.float32(value if np.ndim(value) == 0 else value[k]))
                            for name, value in part.constants.items()
                        },
                        old_logp=earlier[position - 1, target].item(),
                        old_entropy=-(earlier[position - 1].exp() * earlier[position - 1]).sum().item(),
                        reference_logp=theirs[position - 1, target].item()
                        if theirs is not None
                        else math.nan,
                        teacher_logp=math.nan
                        if taught is None
                        else taught[position + shift - 1, target].item(),
                        reference_teacher_logp=math.nan
                        if taught_by_other is None
                        else taught_by_other[position + shift - 1, target].item(),
                    )
                )
            if tokens:
                found[part.term].append(SequenceTokens(term=part.term, tokens=tokens))
    num_tokens: dict[str, int] = defaultdict(int)
    num_sequences: dict[str, int] = defaultdict(int)
    for name, sequences in found.items():
        num_tokens[terms[name].pool] += sum(len(sequence.tokens) for sequence in sequences)
        num_sequences[terms[name].pool] += len(sequences)
    loss = torch.zeros((), dtype=torch.float64)
    metrics: dict[str, float] = {}
    for name, sequences in found.items():
        term = terms[name]
        count = sum(len(sequence.tokens) for sequence in sequences)
        for sequence in sequences:
            scale = {
                "token-mean": 1 / num_tokens[term.pool],
                "seq-mean-token-mean": 1 / num_sequences[term.pool] / len(sequence.tokens),
                "seq-mean-token-sum": 1 / num_sequences[term.pool],
                "seq-mean-token-sum-norm": 1 / num_sequences[term.pool] / term.length,
            }[term.aggregation]
            for token in sequence.tokens:
                loss = loss + weights[name] * scale * term.loss(token, sequence, sequences)
                for key, value in term.losses.items():
                    metrics[key] = metrics.get(key, 0.0) + scale * value(token, sequence, sequences)
                for key, value in term.means.items():
                    metrics[key] = metrics.get(key, 0.0) + value(token, sequence, sequences) / count
    loss = loss - _entropy_apart([sequence for some in found.values() for sequence in some], terms)
    loss.backward()
    grads = {
        name: (p.grad if p.grad is not None else torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    # Transformers holds all experts of a layer in one parameter; Hugging Face folders hold one for each expert.
    return {"loss": loss.item(), **metrics}, revert_weight_conversion(model, grads)


def _entropy_apart(sequences: Sequence[SequenceTokens], terms: Mapping[str, OracleTerm]) -> Tensor:
    """The entropy bonus of the terms whose entropy is averaged apart from their loss."""
    chosen = [sequence for sequence in sequences if terms[sequence.term].entropy_bonus]
    count = sum(len(sequence.tokens) for sequence in chosen)
    bonus = torch.zeros((), dtype=torch.float64)
    for sequence in chosen:
        term = terms[sequence.term]
        divisor = {
            "token-mean": count,
            "seq-mean-token-mean": len(chosen) * len(sequence.tokens),
            "seq-mean-token-sum": len(chosen),
            "seq-mean-token-sum-norm": len(chosen) * term.length,
        }[term.entropy_aggregation]
        for token in sequence.tokens:
            bonus = bonus + term.entropy_bonus * token.entropy / divisor
    return bonus


def _teacher_log_softmax(
    model: torch.nn.Module | None, sample: TrainSample, temperature: float
) -> Tensor | None:
    if model is None or sample.teacher_ids is None:
        return None
    with torch.no_grad():
        return _log_softmax(model, TrainSample(token_ids=sample.teacher_ids, parts=()), temperature)


def _log_softmax(model: torch.nn.Module, sample: TrainSample, temperature: float) -> Tensor:
    ids = torch.from_numpy(np.asarray(sample.token_ids))[None]
    with forced_routes(model, sample.routes):
        return torch.log_softmax(model(ids).logits[0, :-1] / temperature, dim=-1)


@contextlib.contextmanager
def forced_routes(model: Any, routes: np.ndarray | None) -> Iterator[None]:
    """Within it, the first R tokens of the only sequence pass through the experts ``routes`` [R, layers, k].

    The weights of the experts are computed from the router's logits by the formulas of the models' papers.
    """
    if routes is None:
        yield
        return
    config = model.config

    def force(layer: int) -> Callable[..., Any]:
        def hook(router: Any, inputs: Any, output: Any) -> Any:
            logits, _, chosen = output
            chosen = chosen.clone()
            chosen[: len(routes)] = torch.from_numpy(routes[:, layer].astype(np.int64))
            is_sigmoid = getattr(config, "scoring_func", "softmax") == "sigmoid"
            scores = logits.double().sigmoid() if is_sigmoid else logits.double().softmax(-1)
            weights = scores.gather(1, chosen)
            if config.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights * getattr(config, "routed_scaling_factor", 1.0), chosen

        return hook

    layers = model.model.layers
    gates = {number: getattr(layer.mlp, "gate", None) for number, layer in enumerate(layers)}
    hooks = [gate.register_forward_hook(force(number)) for number, gate in gates.items() if gate is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
