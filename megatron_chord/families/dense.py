"""The decoder that all families here share: RMS norms, grouped-query attention with RoPE, a gated SiLU MLP.

Hugging Face's names are those of Transformers' modeling_llama.py. Megatron's are those of its local layer spec, and
of Transformer Engine's, which fuses two norms with the projection after them (megatron-core 0.16.1,
models/gpt/gpt_layer_specs.py:279, 417, 496).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chord.families.shape import Experts, ModelShape, Rope, refuse, required_value
from megatron_chord.weights.mapping import Rule, WeightMap, both, hf_layer, layer
from megatron_chord.weights.transforms import GroupedQKV, Same, Stacked


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of every layer, with the norm before it."""

    rules: tuple[Rule, ...]
    transformer: Mapping[str, Any]
    num_kv_heads: int


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The MLP or the experts after the attention of each layer, with the norm before them."""

    rules: tuple[Rule, ...]
    transformer: Mapping[str, Any]
    experts: Experts | None = None


MAX_BLOCKS = 250_000
"""Limit of layers x experts. The largest published models have about 25,000. With very many of them, the names of all
tensors would fill the memory."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FREQUENCIES = (
    *hf_layer(*(f"self_attn.rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))),
    "model.rotary_emb.inv_freq",
)
"""RoPE's frequencies, which older folders contain and config.json determines. Transformers and vLLM skip them."""

PRE_MLP_NORM = Rule(
    # Transformer Engine's layer spec fuses it with a dense MLP, and leaves it alone before experts.
    megatron=both("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    hf=hf_layer("post_attention_layernorm.weight"),
    transform=Same(),
)


def gated_mlp_rules(layers: tuple[int, ...] | None = None) -> tuple[Rule, ...]:
    """The rules of the dense MLPs of these layers (None: all layers), without the norm before them."""
    return (
        Rule(
            megatron=layer("mlp.linear_fc1.weight"),
            hf=hf_layer("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            transform=Stacked(),
            layers=layers,
        ),
        Rule(
            megatron=layer("mlp.linear_fc2.weight"),
            hf=hf_layer("mlp.down_proj.weight"),
            transform=Same(axis=1),
            layers=layers,
        ),
    )


def gated_mlp() -> FeedForward:
    return FeedForward(rules=(PRE_MLP_NORM, *gated_mlp_rules()), transformer={})


def decoder(
    config: Mapping[str, Any],
    *,
    rope: Rope,
    attention: Attention | None = None,
    feed_forward: FeedForward | None = None,
    num_unread_layers: int = 0,
) -> ModelShape:
    """The model of this config.json.

    Args:
        attention: default: ``grouped_attention`` with the sizes of config.json.
        feed_forward: default: a dense gated MLP.
        num_unread_layers: see ``WeightMap.num_unread_layers``.

    Raises:
        ValueError: config.json lacks a size, or has a setting that Megatron's model would compute differently.
    """
    attention = attention or grouped_attention(config)
    feed_forward = feed_forward or gated_mlp()
    activation = config.get("hidden_act", "silu")
    # Two names of one function in Transformers; see ``serving_config`` in families/table.py.
    refuse(activation not in ("silu", "swish"), config, f"hidden_act {activation!r} is not silu")
    tied = bool(config.get("tie_word_embeddings", False))
    num_layers = required_value(config, "num_hidden_layers")
    num_experts = feed_forward.experts.count if feed_forward.experts else 0
    refuse(
        num_layers * max(num_experts, 1) > MAX_BLOCKS,
        config,
        f"num_hidden_layers {num_layers} with {num_experts} experts in a layer are more than this program can list",
    )
    return ModelShape(
        family=required_value(config, "model_type"),
        vocab_size=required_value(config, "vocab_size"),
        num_layers=num_layers,
        hidden_size=required_value(config, "hidden_size"),
        num_heads=required_value(config, "num_attention_heads"),
        num_kv_heads=attention.num_kv_heads,
        ffn_size=required_value(config, "intermediate_size"),
        max_positions=required_value(config, "max_position_embeddings"),
        tied=tied,
        rope=rope,
        experts=feed_forward.experts,
        transformer={
            "normalization": "RMSNorm",
            "layernorm_epsilon": required_value(config, "rms_norm_eps"),
            "activation_func": "silu",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            **attention.transformer,
            **feed_forward.transformer,
        },
        weights=WeightMap(
            rules=(*_embedding_rules(tied), *attention.rules, *feed_forward.rules),
            num_layers=num_layers,
            num_experts=num_experts,
            unread=_FREQUENCIES,
            copies={HEAD: EMBEDDING} if tied else {},
            num_unread_layers=num_unread_layers,
        ),
    )


def _embedding_rules(tied: bool) -> tuple[Rule, ...]:
    return (
        Rule(
            megatron=("embedding.word_embeddings.weight",),
            hf=(EMBEDDING,),
            transform=Same(axis=0),
            vocab=True,
        ),
        Rule(megatron=("decoder.final_layernorm.weight",), hf=("model.norm.weight",), transform=Same()),
        Rule(
            megatron=("output_layer.weight",),
            hf=(EMBEDDING if tied else HEAD,),
            transform=Same(axis=0),
            vocab=True,
            exported=not tied,
        ),
    )


def grouped_attention(
    config: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> Attention:
    """Grouped-query attention.

    Args:
        head_dim: default: that of config.json, or hidden size / heads.
        num_kv_heads: default: that of config.json.
        qkv_bias: whether query, key and value have biases.
        qk_norm: whether queries and keys pass through a norm, head by head, before RoPE.
    """
    num_heads = required_value(config, "num_attention_heads")
    groups: int = num_kv_heads or required_value(config, "num_key_value_heads")
    refuse(
        num_heads % groups != 0,
        config,
        f"{num_heads} attention heads are no multiple of {groups} key-value heads",
    )
    width: int = head_dim or config.get("head_dim") or required_value(config, "hidden_size") // num_heads
    return Attention(
        rules=_grouped_attention_rules(num_heads // groups, width, qkv_bias=qkv_bias, qk_norm=qk_norm),
        transformer={"kv_channels": width, "add_qkv_bias": qkv_bias, "qk_layernorm": qk_norm},
        num_kv_heads=groups,
    )


def _grouped_attention_rules(
    queries_per_group: int, head_dim: int, *, qkv_bias: bool, qk_norm: bool
) -> tuple[Rule, ...]:
    qkv = GroupedQKV(queries_per_group, head_dim)
    rules = [
        Rule(
            megatron=both("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            hf=hf_layer("input_layernorm.weight"),
            transform=Same(),
        ),
        Rule(
            megatron=layer("self_attention.linear_qkv.weight"),
            hf=hf_layer("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            transform=qkv,
        ),
        Rule(
            megatron=layer("self_attention.linear_proj.weight"),
            hf=hf_layer("self_attn.o_proj.weight"),
            transform=Same(axis=1),
        ),
    ]
    if qkv_bias:
        rules.append(
            Rule(
                megatron=layer("self_attention.linear_qkv.bias"),
                hf=hf_layer("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
                transform=qkv,
            )
        )
    if qk_norm:
        # Not fused with anything: the name is the same in both layer specs.
        rules += [
            Rule(
                megatron=layer(f"self_attention.{part}_layernorm.weight"),
                hf=hf_layer(f"self_attn.{part}_norm.weight"),
                transform=Same(),
            )
            for part in ("q", "k")
        ]
    return tuple(rules)
