"""The number of parameters on each rank, computed from the family's weight table and the model's sizes.

The table lists the parameters, and which of them are cut over the tensor axis, spread over the expert axis or padded.
The shape of a parameter follows from its name. Names are Megatron's (local layer spec). No tensor is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.stages import stage_layers
from megatron_chord.families.shape import ModelShape
from megatron_chord.weights.mapping import Rule, padded_vocab_size

_LAYER = "decoder.layers.{layer}."
_FIRST_STAGE = "embedding.word_embeddings.weight"
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a weight, by ``model.dtype``."""
_BUFFERS = (_LAYER + "mlp.router.expert_bias",)
"""Weights that are buffers in Megatron and are not trained."""
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
    """The sizes of a model that the formulas of memory and time need."""

    query: int
    """Width of all queries: heads x head size."""
    key: int
    """Width of all keys."""
    value: int
    """Width of all values."""
    attended: int
    """Width of attention's output: heads x a value's size."""
    latents: int
    """Width of the latents from which queries, keys and values are made; 0 where they come from hidden states."""
    cache: int
    """Number of elements that the KV cache stores for a token in each layer."""
    decode_channels: int
    """Multiplications of a decoded token with the cached elements of one position in one layer, for scores and
    values."""
    gates: int
    """Projections into the MLP: 2 for a gated one."""
    expert_width: int
    """Width of one expert; 0 for a dense model."""
    top_k: int
    """Number of experts of a token; 0 for a dense model."""

    @classmethod
    def of(cls, shape: ModelShape) -> Sizes:
        settings: Mapping[str, Any] = shape.transformer
        attention = _latent_sizes(shape) if shape.has_latent_attention else _grouped_sizes(shape)
        return cls(
            **attention,
            gates=2 if settings["gated_linear_unit"] else 1,
            expert_width=settings["moe_ffn_hidden_size"] if shape.experts else 0,
            top_k=settings["moe_router_topk"] if shape.experts else 0,
        )


def _grouped_sizes(shape: ModelShape) -> dict[str, int]:
    head = shape.transformer["kv_channels"]
    query, kv = shape.num_heads * head, shape.num_kv_heads * head
    return {
        "query": query,
        "key": kv,
        "value": kv,
        "attended": query,
        "latents": 0,
        "cache": 2 * kv,
        "decode_channels": 2 * query,
    }


def _latent_sizes(shape: ModelShape) -> dict[str, int]:
    settings, heads = shape.transformer, shape.num_heads
    rotated, latent = settings["qk_pos_emb_head_dim"], settings["kv_lora_rank"]
    query, value = heads * (settings["qk_head_dim"] + rotated), heads * settings["v_head_dim"]
    return {
        "query": query,
        "key": query,
        "value": value,
        "attended": value,
        "latents": latent + (settings["q_lora_rank"] or 0),
        "cache": latent + rotated,
        # In decoding, the up-projections from the latent are absorbed into the projections of query and output (arXiv
        # 2405.04434, 2.1.2). So every head computes its scores from the cached elements, and its values are the
        # latent.
        "decode_channels": heads * (latent + rotated + latent),
    }


def checkpoint_bytes(parameters: int, weight_bytes: float, *, optimizers: int = 1) -> float:
    """Bytes of one training checkpoint: the weights, and in FP32 the optimizer's copy of them (also of FP32 weights)
    and two moments, for each of ``optimizers`` optimizer states."""
    return (weight_bytes + 12 * optimizers) * parameters


def model_count(shape: ModelShape) -> int:
    """Number of elements in the model's Hugging Face folder: a tied head counts once, padding rows do not count."""
    known = all_dims(shape)
    return sum(_copies(rule, shape) * _size(rule, known) for rule in shape.weights.rules if rule.exported)


def largest_tensor(shape: ModelShape) -> int:
    """Number of elements of the largest tensor in the model's Hugging Face folder."""
    known, sizes = all_dims(shape), list[int]()
    for rule in shape.weights.rules:
        rows, *others = known[rule.megatron[0]]
        parts = rule.transform.rows(0, rows, rows)
        sizes += [(part.stop - part.start) * math.prod(others) for part in parts]
    return max(sizes)


def active_count(shape: ModelShape) -> int:
    """Number of parameters that multiply one token: including the head and the chosen experts, without the
    embedding."""
    chosen, known = Sizes.of(shape).top_k, all_dims(shape)
    return sum(
        _size(rule, known) * _num_layers(rule, shape) * (chosen if rule.of_expert else 1)
        for rule in shape.weights.rules
        if rule.megatron[0] != _FIRST_STAGE and len(known[rule.megatron[0]]) > 1
    )


def active_in_layer(shape: ModelShape, number: int, part: str = "") -> int:
    """The part of ``active_count`` in layer ``number``. ``part`` is a prefix of the parameters' names in the layer."""
    chosen, known = Sizes.of(shape).top_k, all_dims(shape)
    return sum(
        _size(rule, known) * (chosen if rule.of_expert else 1)
        for rule in shape.weights.rules
        if rule.megatron[0].startswith(_LAYER + part)
        and _layers_with(rule, [number])
        and len(known[rule.megatron[0]]) > 1
    )


def head_count(shape: ModelShape) -> int:
    """The part of ``active_count`` in the head."""
    return shape.vocab_size * shape.hidden_size


def expert_count(shape: ModelShape) -> int:
    """Parameters of all experts together."""
    known = all_dims(shape)
    return sum(_copies(rule, shape) * _size(rule, known) for rule in shape.weights.rules if rule.of_expert)


def uncut_count(shape: ModelShape) -> int:
    """Number of elements of the parameters that are not cut over the tensor axis: norms, routers, projections to
    latents.

    Experts do not count, because vLLM cuts each of them over its tensor axis or distributes them over ranks.
    """
    known = all_dims(shape)
    return sum(
        _copies(rule, shape) * _size(rule, known)
        for rule in shape.weights.rules
        if rule.exported and rule.transform.axis is None and not rule.of_expert
    )


def rank_count(shape: ModelShape, parallel: ParallelConfig, stage: int) -> Count:
    """Parameters of one rank of pipeline stage ``stage``, padding rows included; the same on all its ranks."""
    layers = stage_layers(shape.num_layers, parallel, stage)
    first, last = stage == 0, stage == parallel.pipeline - 1
    known, found = all_dims(shape), Count()
    for rule in shape.weights.rules:
        name = rule.megatron[0]
        if (name == _FIRST_STAGE and not first) or (name in _LAST_STAGE and not last) or name in _BUFFERS:
            continue
        if name == "output_layer.weight" and shape.tied and first:
            continue  # the embedding itself
        number = len(_layers_with(rule, layers)) if name.startswith(_LAYER) else 1
        found += _rank_part(rule, known[name], shape, parallel).times(number)
    return found


def _rank_part(rule: Rule, whole: Sequence[int], shape: ModelShape, parallel: ParallelConfig) -> Count:
    """The count of one rule: for one layer, or for the whole rank if the parameter does not belong to a layer.

    ``whole``: shape of one whole parameter of the rule.
    """
    sizes = list(whole)
    if rule.vocab:
        sizes[0] = padded_vocab_size(shape.vocab_size, parallel.tensor)
    size = math.prod(sizes)
    if rule.of_expert:
        assert shape.experts is not None
        return Count(experts=size * (shape.experts.count // parallel.expert))
    return Count(dense=size // (parallel.tensor if rule.transform.axis is not None else 1))


def _copies(rule: Rule, shape: ModelShape) -> int:
    """Number of parameters of the model to which the rule applies."""
    return _num_layers(rule, shape) * (shape.weights.num_experts if rule.of_expert else 1)


def _num_layers(rule: Rule, shape: ModelShape) -> int:
    """Number of layers with the rule's parameter; 1 for parameters that do not belong to a layer."""
    every = range(shape.num_layers)
    return len(_layers_with(rule, every)) if rule.megatron[0].startswith(_LAYER) else 1


def _layers_with(rule: Rule, layers: Sequence[int]) -> Sequence[int]:
    return layers if rule.layers is None else sorted(set(layers) & set(rule.layers))


def _size(rule: Rule, known: Mapping[str, Sequence[int]]) -> int:
    return math.prod(known[rule.megatron[0]])


def all_dims(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The first Megatron name of each rule of the model -> shape of one whole parameter of it, without padding.

    Raises:
        ValueError: the shape of a parameter is not known.
    """
    of, hidden = Sizes.of(shape), shape.hidden_size
    shared = (shape.experts.shared_ffn_size or 0) if shape.experts else 0
    known: dict[str, tuple[int, ...]] = {
        _FIRST_STAGE: (shape.vocab_size, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (shape.vocab_size, hidden),
        "input_layernorm.weight": (hidden,),
        **(_latent_dims(shape, of) if shape.has_latent_attention else _grouped_dims(shape, of)),
        "self_attention.linear_proj.weight": (hidden, of.attended),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (of.gates * shape.ffn_size, hidden),
        "mlp.linear_fc2.weight": (hidden, shape.ffn_size),
        "mlp.router.weight": (shape.weights.num_experts, hidden),
        "mlp.router.expert_bias": (shape.weights.num_experts,),
        "mlp.experts.local_experts.{expert}.linear_fc1.weight": (of.gates * of.expert_width, hidden),
        "mlp.experts.local_experts.{expert}.linear_fc2.weight": (hidden, of.expert_width),
        "mlp.shared_experts.linear_fc1.weight": (of.gates * shared, hidden),
        "mlp.shared_experts.linear_fc2.weight": (hidden, shared),
        "mlp.shared_experts.gate_weight": (1, hidden),
    }
    names = [rule.megatron[0] for rule in shape.weights.rules]
    unknown = [name for name in names if name.removeprefix(_LAYER) not in known]
    if unknown:
        raise ValueError(f"the size of {unknown[0]} is not known ({shape.family})")
    return {name: known[name.removeprefix(_LAYER)] for name in names}


def _grouped_dims(shape: ModelShape, of: Sizes) -> dict[str, tuple[int, ...]]:
    width, head = of.query + of.key + of.value, shape.transformer["kv_channels"]
    return {
        "self_attention.linear_qkv.weight": (width, shape.hidden_size),
        "self_attention.linear_qkv.bias": (width,),
        "self_attention.q_layernorm.weight": (head,),
        "self_attention.k_layernorm.weight": (head,),
    }


def _latent_dims(shape: ModelShape, of: Sizes) -> dict[str, tuple[int, ...]]:
    settings, hidden = shape.transformer, shape.hidden_size
    latent, query_latent = settings["kv_lora_rank"], settings["q_lora_rank"] or 0
    return {
        "self_attention.linear_q_proj.weight": (of.query, hidden),
        "self_attention.linear_q_down_proj.weight": (query_latent, hidden),
        "self_attention.q_layernorm.weight": (query_latent,),
        "self_attention.linear_q_up_proj.weight": (of.query, query_latent),
        # The part of the keys that RoPE rotates is not made from the latent, and all heads share it.
        "self_attention.linear_kv_down_proj.weight": (latent + settings["qk_pos_emb_head_dim"], hidden),
        "self_attention.kv_layernorm.weight": (latent,),
        "self_attention.linear_kv_up_proj.weight": (
            shape.num_heads * settings["qk_head_dim"] + of.value,
            latent,
        ),
    }
