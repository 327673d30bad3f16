"""Qwen1.5-MoE and Qwen2-MoE, with a gated shared expert (Transformers' modeling_qwen2_moe.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder, grouped_attention
from megatron_chord.families.moe import Names, mixture, qwen_dense_layers
from megatron_chord.families.settings import read_rope, refuse_head_dim, refuse_sliding_layers
from megatron_chord.families.shape import Experts, ModelShape, refuse, required_value


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_sliding_layers(config)
    refuse(
        config.get("qkv_bias") is False,
        config,
        "qkv_bias false is not supported: vLLM's layer has the biases",
    )
    refuse_head_dim(config)
    refuse(
        required_value(config, "shared_expert_intermediate_size") == 0,
        config,
        "a shared expert of width 0 is not supported",
    )
    feed_forward = mixture(
        config,
        experts=Experts(
            count=required_value(config, "num_experts"),
            shared_ffn_size=required_value(config, "shared_expert_intermediate_size"),
            dense_layers=qwen_dense_layers(config),
        ),
        width=required_value(config, "moe_intermediate_size"),
        normalised=bool(config.get("norm_topk_prob", False)),
        names=Names(shared="shared_expert", shared_gate="shared_expert_gate"),
    )
    return decoder(
        config,
        rope=read_rope(config),
        attention=grouped_attention(config, qkv_bias=True),
        feed_forward=feed_forward,
    )
