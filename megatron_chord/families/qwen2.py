"""Qwen2 and Qwen2.5, dense (Transformers' modeling_qwen2.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder, grouped_attention
from megatron_chord.families.settings import read_rope, refuse_head_dim, refuse_sliding_layers
from megatron_chord.families.shape import ModelShape


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_sliding_layers(config)
    refuse_head_dim(config)
    return decoder(config, rope=read_rope(config), attention=grouped_attention(config, qkv_bias=True))
