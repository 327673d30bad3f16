"""How many parameters each rank holds, from the family's weight table and the model's sizes.

The table says which parameters there are, and which are cut over the tensor axis, spread over the expert axis or
padded; the sizes of each follow from its name. Names are Megatron's (local layer spec). No tensor is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chord.config import ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.weights.mapping import Rule, padded_vocab_size

_LAYER = "decoder.layers.{layer}."
_FIRST_STAGE = "embedding.word_embeddings.weight"
_LAST_STAGE = ("decoder.final_layernorm.weight", "output_layer.weight")


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters on one rank. ``experts`` are reduced, and their optimizer state sharded, over fewer ranks."""

    dense: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def __add__(self, other: Count) -> Count:
        return Count(dense=self.dense + other.dense, experts=self.experts + other.experts)

    def times(self, number: int) -> Count:
        return Count(dense=self.dense * number, experts=self.experts * number)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the formulas of memory and time need of a model, in numbers of its own."""

    query: int
    """Width of all queries: heads x head size."""
    kv: int
    """Width of all keys, and of all values."""
    gates: int
    """Projections into the MLP: 2 for a gated one."""
    expert_width: int
    """Of one expert; 0 for a dense model."""
    top_k: int
    """Experts that a token passes; 0 for a dense model."""

    @classmethod
    def of(cls, shape: ModelShape) -> Sizes:
        settings: Mapping[str, Any] = shape.transformer
        head = settings["kv_channels"]
        return cls(
            query=shape.num_heads * head,
            kv=shape.num_kv_heads * head,
            gates=2 if settings["gated_linear_unit"] else 1,
            expert_width=settings["moe_ffn_hidden_size"] if shape.experts else 0,
            top_k=settings["moe_router_topk"] if shape.experts else 0,
        )


def model_count(shape: ModelShape) -> int:
    """Parameters of the whole model, a tied head counted once, without padding rows of the vocabulary."""
    return sum(
        _copies(rule, shape) * math.prod(dims(rule, shape)) for rule in shape.weights.rules if rule.exported
    )


def active_count(shape: ModelShape) -> int:
    """Parameters that multiply one token: the whole head, the embedding's lookup not, of the experts the chosen."""
    total = 0
    for rule in shape.weights.rules:
        size = math.prod(dims(rule, shape))
        if rule.megatron[0] == _FIRST_STAGE or len(dims(rule, shape)) < 2:
            continue
        copies = (
            shape.num_layers * Sizes.of(shape).top_k
            if rule.of_expert
            else _copies(rule, shape, experts=False)
        )
        total += size * copies
    return total


def expert_count(shape: ModelShape) -> int:
    """Parameters of all experts together."""
    return sum(
        _copies(rule, shape) * math.prod(dims(rule, shape)) for rule in shape.weights.rules if rule.of_expert
    )


def rank_count(shape: ModelShape, parallel: ParallelConfig, stage: int) -> Count:
    """Parameters of one rank of pipeline stage ``stage``, padding rows included; the same on all its ranks."""
    layers = shape.num_layers // parallel.pipeline
    first, last = stage == 0, stage == parallel.pipeline - 1
    found = Count()
    for rule in shape.weights.rules:
        name = rule.megatron[0]
        if (name == _FIRST_STAGE and not first) or (name in _LAST_STAGE and not last):
            continue
        if name == "output_layer.weight" and shape.tied and first:
            continue  # the embedding itself
        number = layers if name.startswith(_LAYER) else 1
        found += _rank_part(rule, shape, parallel).times(number)
    return found


def _rank_part(rule: Rule, shape: ModelShape, parallel: ParallelConfig) -> Count:
    """Of one layer, or of the whole rank for what is no layer's."""
    sizes = list(dims(rule, shape))
    if rule.vocab:
        sizes[0] = padded_vocab_size(shape.vocab_size, parallel.tensor)
    size = math.prod(sizes)
    if rule.of_expert:
        assert shape.experts is not None
        return Count(experts=size * (shape.experts.count // parallel.expert))
    return Count(dense=size // (parallel.tensor if rule.transform.axis is not None else 1))


def _copies(rule: Rule, shape: ModelShape, *, experts: bool = True) -> int:
    """How often the model has the rule's parameter."""
    layers = shape.num_layers if rule.megatron[0].startswith(_LAYER) else 1
    return layers * (shape.weights.num_experts if rule.of_expert and experts else 1)


def dims(rule: Rule, shape: ModelShape) -> tuple[int, ...]:
    """Shape of one whole parameter of this rule, without padding.

    Raises:
        ValueError: a parameter that this module knows no sizes of.
    """
    of, hidden = Sizes.of(shape), shape.hidden_size
    head = shape.transformer["kv_channels"]
    shared = (shape.experts.shared_ffn_size or 0) if shape.experts else 0
    known: dict[str, tuple[int, ...]] = {
        _FIRST_STAGE: (shape.vocab_size, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (shape.vocab_size, hidden),
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (of.query + 2 * of.kv, hidden),
        "self_attention.linear_qkv.bias": (of.query + 2 * of.kv,),
        "self_attention.linear_proj.weight": (hidden, of.query),
        "self_attention.q_layernorm.weight": (head,),
        "self_attention.k_layernorm.weight": (head,),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (of.gates * shape.ffn_size, hidden),
        "mlp.linear_fc2.weight": (hidden, shape.ffn_size),
        "mlp.router.weight": (shape.weights.num_experts, hidden),
        "mlp.experts.local_experts.{expert}.linear_fc1.weight": (of.gates * of.expert_width, hidden),
        "mlp.experts.local_experts.{expert}.linear_fc2.weight": (hidden, of.expert_width),
        "mlp.shared_experts.linear_fc1.weight": (of.gates * shared, hidden),
        "mlp.shared_experts.linear_fc2.weight": (hidden, shared),
        "mlp.shared_experts.gate_weight": (1, hidden),
    }
    name = rule.megatron[0].removeprefix(_LAYER)
    if name not in known:
        raise ValueError(f"the planner does not know the size of {rule.megatron[0]} ({shape.family})")
    return known[name]
