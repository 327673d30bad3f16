"""The result of reading a config.json by a family: Megatron's settings and the weight table. Megatron is not
imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chord.routes import RouteShape
from megatron_chord.weights.mapping import WeightMap


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every RoPE frequency divided by ``factor``."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies are divided by ``factor``, high ones are kept, and those between are
    interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's scaling (arXiv 2309.00071, section 3.2).

    The frequencies of dimensions that rotate less than ``beta_slow`` times over the original positions are divided by
    ``factor``. Those of dimensions that rotate more than ``beta_fast`` times are kept. Between them is a linear ramp.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class Rope:
    base: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Sizes of the mixture of experts that replaces the dense MLP of a layer."""

    count: int
    shared_ffn_size: int | None = None
    """Width of the shared expert, which every token passes through."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers that keep a dense MLP."""


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
    """True if the output head is the input embedding."""
    rope: Rope
    experts: Experts | None
    """None for a dense model."""
    transformer: Mapping[str, Any]
    """Fields of Megatron-Core's TransformerConfig beyond parallelism and dtype; activation_func by name."""
    weights: WeightMap

    @property
    def routes(self) -> RouteShape | None:
        """The shape of the routes of the model's tokens; None for a dense model."""
        if self.experts is None:
            return None
        return RouteShape(
            layers=self.num_layers,
            experts=self.experts.count,
            chosen=self.transformer["moe_router_topk"],
            dense_layers=self.experts.dense_layers,
        )

    @property
    def has_latent_attention(self) -> bool:
        return bool(self.transformer.get("multi_latent_attention"))


def required_value(config: Mapping[str, Any], name: str) -> Any:
    """The value in config.json. Raises ValueError with its name if it is missing."""
    if config.get(name) is None:
        raise ValueError(f"config.json of model_type {config.get('model_type')!r} has no {name!r}")
    return config[name]


def refuse(condition: bool, config: Mapping[str, Any], reason: str) -> None:
    if condition:
        raise ValueError(f"config.json of model_type {config.get('model_type')!r}: {reason}")
