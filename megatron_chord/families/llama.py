"""Llama 2 and 3.x, text only (Transformers' modeling_llama.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder, grouped_attention
from megatron_chord.families.settings import read_rope, refuse_biases, refuse_short_window
from megatron_chord.families.shape import ModelShape, required_value


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_biases(config, "attention_bias", "mlp_bias")
    refuse_short_window(config, default=None)
    return decoder(
        config,
        rope=read_rope(config),
        attention=grouped_attention(
            config,
            num_kv_heads=config.get("num_key_value_heads") or required_value(config, "num_attention_heads"),
        ),
    )
