"""Qwen3-MoE (Transformers' modeling_qwen3_moe.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder
from megatron_chord.families.moe import mixture, refuse_dense_layers
from megatron_chord.families.settings import read_rope, refuse_biases, refuse_sliding_layers
from megatron_chord.families.shape import Experts, ModelShape, require


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_sliding_layers(config)
    refuse_biases(config, "attention_bias")
    refuse_dense_layers(config)
    # Transformers 5 writes num_local_experts where 4 wrote num_experts.
    count = config.get("num_local_experts") or require(config, "num_experts")
    feed_forward = mixture(
        config,
        experts=Experts(count=count),
        width=require(config, "moe_intermediate_size"),
        normalised=bool(config.get("norm_topk_prob", False)),
    )
    return decoder(config, rope=read_rope(config), feed_forward=feed_forward, qk_norm=True)
