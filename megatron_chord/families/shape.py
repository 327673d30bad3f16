"""What a model family says of a config.json: Megatron's settings and the weight table, without importing Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chord.weights.mapping import WeightMap


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    family: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    max_positions: int
    tied: bool
    """The output head is the input embedding."""
    rotary_base: float
    transformer: Mapping[str, Any]
    """Fields of Megatron-Core's TransformerConfig beyond parallelism and dtype; activation_func by name."""
    weights: WeightMap


def require(config: Mapping[str, Any], name: str) -> Any:
    """The config.json's value, or a ValueError that says which is missing."""
    if config.get(name) is None:
        raise ValueError(f"config.json of model_type {config.get('model_type')!r} has no {name!r}")
    return config[name]


def refuse(condition: bool, config: Mapping[str, Any], reason: str) -> None:
    if condition:
        raise ValueError(f"config.json of model_type {config.get('model_type')!r}: {reason}")
