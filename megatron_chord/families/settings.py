"""Functions that families share for reading a config.json. Defaults of missing settings are those of Transformers 5.

Every function raises ValueError for a setting that Megatron's model would compute differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.shape import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    refuse,
    required_value,
)


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """RoPE's settings in config.json, under the name of Transformers 5 or of Transformers 4.

    If both are present, the result is that of Transformers 5 (modeling_rope_utils.py, convert_rope_params_to_dict).
    """
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_kind(config: Mapping[str, Any]) -> Any:
    """RoPE's type in config.json, such as ``yarn``. Without one: ``default``."""
    stated = rope_parameters(config)
    return stated.get("rope_type", stated.get("type", "default"))


def read_rope(config: Mapping[str, Any], *, default_base: float = 10_000.0, yarn: bool = False) -> Rope:
    """RoPE in Transformers 5's spelling (``rope_parameters``) or 4's (``rope_theta`` with ``rope_scaling``).

    ``yarn``: the family may scale by YaRN, as long as queries and keys keep their size.
    """
    stated = rope_parameters(config)
    refuse(
        any(isinstance(value, Mapping) for value in stated.values()),
        config,
        "RoPE that differs between kinds of layers is not supported",
    )

    def of(name: str, default: Any) -> Any:
        return next((at[name] for at in (stated, config) if at.get(name) is not None), default)

    share = of("partial_rotary_factor", 1.0)
    refuse(
        share != 1.0, config, f"RoPE on a part of the head (partial_rotary_factor {share}) is not supported"
    )
    base = float(of("rope_theta", default_base))
    kind = rope_kind(config)
    match kind:
        case "default":
            return Rope(base=base)
        case "linear":
            return Rope(base=base, scaling=LinearScaling(factor=_number(config, stated, "factor")))
        case "llama3":
            scaling = Llama3Scaling(
                factor=_number(config, stated, "factor"),
                low_freq_factor=_number(config, stated, "low_freq_factor"),
                high_freq_factor=_number(config, stated, "high_freq_factor"),
                original_max_positions=_original_max_positions(config, stated),
            )
            refuse(
                not 0 < scaling.low_freq_factor < scaling.high_freq_factor,
                config,
                f"RoPE's low_freq_factor {scaling.low_freq_factor} must lie between 0 and high_freq_factor "
                f"{scaling.high_freq_factor}",
            )
            return Rope(base=base, scaling=scaling)
        case "yarn" if yarn:
            return Rope(base=base, scaling=_yarn(config, stated))
        case _:
            raise ValueError(
                f"config.json of model_type {config.get('model_type')!r}: RoPE scaling of type {kind!r} is not "
                "supported"
            )


def _yarn(config: Mapping[str, Any], stated: Mapping[str, Any]) -> YarnScaling:
    """Defaults are those of Transformers 5 (modeling_rope_utils.py, _compute_yarn_parameters)."""
    scaling = YarnScaling(
        factor=_number(config, stated, "factor"),
        beta_fast=float(stated.get("beta_fast") or 32),
        beta_slow=float(stated.get("beta_slow") or 1),
        original_max_positions=_original_max_positions(config, stated),
    )
    mscale, over_all = stated.get("mscale"), stated.get("mscale_all_dim")
    stretch = stated.get("attention_factor")
    keeps_size = stretch is None and (scaling.factor <= 1 or (mscale and mscale == over_all))
    refuse(
        stated.get("truncate") is False,
        config,
        "YaRN with truncate false is not supported: Transformers would not round the ramp's ends, vLLM would",
    )
    refuse(
        not keeps_size,
        config,
        f"YaRN that stretches queries and keys is not supported: mscale {mscale} and mscale_all_dim {over_all} must "
        f"be equal and attention_factor {stretch} absent (vLLM and Transformers read it differently)",
    )
    return scaling


def _original_max_positions(config: Mapping[str, Any], stated: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    return config.get(name) or stated.get(name) or required_value(config, "max_position_embeddings")


def _number(config: Mapping[str, Any], rope: Mapping[str, Any], name: str) -> float:
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(
            f"config.json of model_type {config.get('model_type')!r}: RoPE scaling needs a positive {name!r}, "
            f"got {value!r}"
        )
    return float(value)


QWEN_WINDOW = 4096
"""The window if config.json does not have it (configuration_qwen2.py)."""


def refuse_biases(config: Mapping[str, Any], *names: str) -> None:
    """Megatron has biases on all linear layers, on query, key and value alone, or on none."""
    for name in names:
        refuse(
            bool(config.get(name)), config, f"{name} is not supported: Megatron's layer would lack the bias"
        )


def refuse_head_dim(config: Mapping[str, Any]) -> None:
    """Transformers reads ``head_dim``; vLLM's layers of Qwen2 and Qwen2-MoE do not."""
    stated, heads = config.get("head_dim"), required_value(config, "num_attention_heads")
    computed = required_value(config, "hidden_size") // heads
    refuse(
        stated not in (None, computed),
        config,
        f"head_dim {stated} is not supported: vLLM takes hidden_size / num_attention_heads, {computed}",
    )


def refuse_sliding_layers(config: Mapping[str, Any]) -> None:
    """Refuse Qwen's ``use_sliding_window``, unless the window spans all positions of the model.

    It gives some or all layers a sliding window. In some of Transformers' models ``layer_types`` lists these layers.
    vLLM, and Transformers' Qwen3-MoE, ignore ``layer_types`` and give all layers the window.
    """
    if not config.get("use_sliding_window"):
        _refuse_layer_types(config)
        return
    refuse(not config.get("layer_types"), config, "sliding-window attention is not supported")
    refuse_short_window(config, default=QWEN_WINDOW)


def refuse_short_window(config: Mapping[str, Any], *, default: int | None) -> None:
    """Refuse ``sliding_window`` if it is shorter than the model's positions. Otherwise it has no effect.

    Mistral has this window on all layers. vLLM reads the setting for every family.
    """
    _refuse_layer_types(config)
    window = config.get("sliding_window", default)
    positions = required_value(config, "max_position_embeddings")
    refuse(
        window is not None and window < positions,
        config,
        f"sliding-window attention is not supported: the window of {window} is shorter than the model's "
        f"{positions} positions",
    )


def _refuse_layer_types(config: Mapping[str, Any]) -> None:
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    refuse(
        bool(others),
        config,
        f"sliding-window attention is not supported: layer_types names {', '.join(others)}",
    )
