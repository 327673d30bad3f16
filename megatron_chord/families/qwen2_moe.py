"""Qwen1.5-MoE and Qwen2-MoE, with a gated shared expert (Transformers' modeling_qwen2_moe.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder, grouped_attention
from megatron_chord.families.moe import Names, mixture, qwen_dense_layers
from megatron_chord.families.settings import read_rope, refuse_sliding_layers
from megatron_chord.families.shape import Experts, ModelShape, require


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_sliding_layers(config)
    feed_forward = mixture(
        config,
        experts=Experts(
            count=require(config, "num_experts"),
            shared_ffn_size=require(config, "shared_expert_intermediate_size"),
            dense_layers=qwen_dense_layers(config),
        ),
        width=require(config, "moe_intermediate_size"),
        normalised=bool(config.get("norm_topk_prob", False)),
        names=Names(shared="shared_expert", shared_gate="shared_expert_gate"),
    )
    return decoder(
        config,
        rope=read_rope(config),
        attention=grouped_attention(config, qkv_bias=bool(config.get("qkv_bias", True))),
        feed_forward=feed_forward,
    )
