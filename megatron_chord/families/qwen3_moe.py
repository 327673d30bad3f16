"""Qwen3-MoE (Transformers' modeling_qwen3_moe.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder, grouped_attention
from megatron_chord.families.moe import mixture, qwen_dense_layers
from megatron_chord.families.settings import read_rope, refuse_biases, refuse_sliding_layers
from megatron_chord.families.shape import Experts, ModelShape, required_value


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_sliding_layers(config)
    refuse_biases(config, "attention_bias")
    # Transformers 5 writes num_local_experts where 4 wrote num_experts.
    count = config.get("num_local_experts") or required_value(config, "num_experts")
    feed_forward = mixture(
        config,
        experts=Experts(count=count, dense_layers=qwen_dense_layers(config)),
        width=required_value(config, "moe_intermediate_size"),
        normalised=bool(config.get("norm_topk_prob", False)),
    )
    attention = grouped_attention(config, qk_norm=True)
    return decoder(config, rope=read_rope(config), attention=attention, feed_forward=feed_forward)
