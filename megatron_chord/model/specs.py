"""Layer specs: that of Transformer Engine if CUDA and it are available, else Megatron's local one with our modules."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(config: Any, vp_stage: int | None) -> Any:
    """TransformerBlockSubmodules of one pipeline stage (and virtual stage) for this TransformerConfig."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if not has_transformer_engine():
        return _local_block_spec(config, vp_stage)
    block: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization="RMSNorm", vp_stage=vp_stage
    )
    for layer in block.layer_specs if config.multi_latent_attention else ():
        _make_latent(layer.submodules.self_attention)
    return block


def _local_block_spec(config: Any, vp_stage: int | None) -> Any:
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_chord.model.local_modules import RMSNorm

    dense = _local_layer_spec(config, num_experts=None)
    sparse = _local_layer_spec(config, num_experts=config.num_moe_experts)
    every: list[int] = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else []
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    here = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    # A block spec is needed to choose the final norm; with a layer spec Megatron would use its own.
    return TransformerBlockSubmodules(
        layer_specs=[dense if every and not every[number] else sparse for number in here],
        layer_norm=RMSNorm,  # type: ignore[arg-type]
    )


def _local_layer_spec(config: Any, *, num_experts: int | None) -> Any:
    """The spec of a layer, dense if ``num_experts`` is None. Parameters are saved under Transformer Engine's names."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.post_training.modelopt.layers import Linear

    from megatron_chord.model.local_modules import PackedAttention, RMSNorm

    layer: Any = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    parts = layer.submodules
    attention = parts.self_attention
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention.submodules.core_attention = PackedAttention
    fused = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if num_experts is None else {}
    if config.multi_latent_attention:
        _make_latent(attention)
        # Replicated, as with Transformer Engine. Megatron's local spec cuts them over the tensor axis and gathers their
        # results, but then each part gets the gradient of only one rank's heads.
        attention.submodules.linear_q_down_proj = Linear
        attention.submodules.linear_kv_down_proj = Linear
        attention.submodules.q_layernorm = RMSNorm
        attention.submodules.kv_layernorm = RMSNorm
        for latent in ("q", "kv"):
            fused[f"self_attention.{latent}_layernorm."] = (
                f"self_attention.linear_{latent}_up_proj.layer_norm_"
            )
    else:
        fused["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if config.qk_layernorm:
            attention.submodules.q_layernorm = RMSNorm
            attention.submodules.k_layernorm = RMSNorm
    parts.sharded_state_dict_keys_map = fused
    return layer


def _make_latent(attention: Any) -> None:
    from megatron_chord.model.latent_attention import LatentAttention

    attention.module = LatentAttention
