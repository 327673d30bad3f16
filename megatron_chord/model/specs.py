"""Layer specs: Transformer Engine's on CUDA machines that have it, else Megatron's local one with our two modules."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(config: Any, vp_stage: int | None) -> Any:
    """TransformerBlockSubmodules of one pipeline stage (and virtual stage) for this TransformerConfig."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if has_transformer_engine():
        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage
        )
    return _local_block_spec(config, vp_stage)


def _local_block_spec(config: Any, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from megatron_chord.model.local_modules import PackedAttention, RMSNorm

    layer: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.submodules.core_attention = PackedAttention
    if config.qk_layernorm:
        parts.self_attention.submodules.q_layernorm = RMSNorm
        parts.self_attention.submodules.k_layernorm = RMSNorm
    if config.num_moe_experts is not None:
        # Megatron would save this norm under the name that it has in front of a dense MLP, unlike the layer spec of
        # Transformer Engine (gpt_layer_specs.py:419).
        keys = layer.submodules.sharded_state_dict_keys_map
        parts.sharded_state_dict_keys_map = {k: v for k, v in keys.items() if k != "pre_mlp_layernorm."}
    # Only a block spec lets us choose the final norm; a layer spec would get Megatron's.
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)  # type: ignore[arg-type]
