"""Qwen3, dense (Transformers' modeling_qwen3.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder, grouped_attention
from megatron_chord.families.settings import read_rope, refuse_biases, refuse_sliding_layers
from megatron_chord.families.shape import ModelShape

HEAD_DIM = 128
"""The size if config.json does not have it (configuration_qwen3.py)."""


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_sliding_layers(config)
    refuse_biases(config, "attention_bias")
    attention = grouped_attention(config, head_dim=config.get("head_dim") or HEAD_DIM, qk_norm=True)
    return decoder(config, rope=read_rope(config), attention=attention)
