"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.shape import ModelShape, refuse, require
from megatron_chord.weights.mapping import Rule, WeightMap, both, hf_layer, layer
from megatron_chord.weights.transforms import GroupedQKV, Same, Stacked


def shape(config: Mapping[str, Any]) -> ModelShape:
    """Raises ValueError for a config.json that this family's Megatron model would not compute exactly."""
    num_heads = require(config, "num_attention_heads")
    num_kv_heads = require(config, "num_key_value_heads")
    hidden_size = require(config, "hidden_size")
    head_dim = config.get("head_dim") or hidden_size // num_heads
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rotary_base = rope["rope_theta"] if "rope_theta" in rope else require(config, "rope_theta")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refuse(rope_type != "default", config, f"RoPE scaling of type {rope_type!r} is not supported")
    refuse(config.get("hidden_act") != "silu", config, f"hidden_act {config.get('hidden_act')!r} is not silu")
    refuse(bool(config.get("use_sliding_window")), config, "sliding-window attention is not supported")
    tied = bool(config.get("tie_word_embeddings", False))
    num_layers = require(config, "num_hidden_layers")
    return ModelShape(
        family="qwen2",
        vocab_size=require(config, "vocab_size"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn_size=require(config, "intermediate_size"),
        max_positions=require(config, "max_position_embeddings"),
        tied=tied,
        rotary_base=rotary_base,
        transformer={
            "kv_channels": head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": require(config, "rms_norm_eps"),
            "activation_func": "silu",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": True,
        },
        weights=WeightMap(rules=_rules(num_heads // num_kv_heads, head_dim, tied), num_layers=num_layers),
    )


def _rules(queries_per_group: int, head_dim: int, tied: bool) -> tuple[Rule, ...]:
    qkv = GroupedQKV(queries_per_group, head_dim)
    embedding = "model.embed_tokens.weight"
    return (
        Rule(
            megatron=("embedding.word_embeddings.weight",),
            hf=(embedding,),
            transform=Same(axis=0),
            vocab=True,
        ),
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
            megatron=layer("self_attention.linear_qkv.bias"),
            hf=hf_layer("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            transform=qkv,
        ),
        Rule(
            megatron=layer("self_attention.linear_proj.weight"),
            hf=hf_layer("self_attn.o_proj.weight"),
            transform=Same(axis=1),
        ),
        Rule(
            megatron=both("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            hf=hf_layer("post_attention_layernorm.weight"),
            transform=Same(),
        ),
        Rule(
            megatron=layer("mlp.linear_fc1.weight"),
            hf=hf_layer("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            transform=Stacked(),
        ),
        Rule(
            megatron=layer("mlp.linear_fc2.weight"),
            hf=hf_layer("mlp.down_proj.weight"),
            transform=Same(axis=1),
        ),
        Rule(megatron=("decoder.final_layernorm.weight",), hf=("model.norm.weight",), transform=Same()),
        Rule(
            megatron=("output_layer.weight",),
            hf=(embedding if tied else "lm_head.weight",),
            transform=Same(axis=0),
            vocab=True,
            exported=not tied,
        ),
    )
