"""Mistral, dense and text only (Transformers' modeling_mistral.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder
from megatron_chord.families.settings import read_rope, refuse_biases, refuse_short_window
from megatron_chord.families.shape import ModelShape

WINDOW = 4096
"""The window if config.json does not have it (configuration_mistral.py)."""


def shape(config: Mapping[str, Any]) -> ModelShape:
    # vLLM reads them, Transformers does not.
    refuse_biases(config, "attention_bias", "mlp_bias")
    refuse_short_window(config, default=WINDOW)
    return decoder(config, rope=read_rope(config))
