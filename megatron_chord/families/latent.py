"""Multi-head latent attention: queries, keys and values from compressed latents (DeepSeek-V2, arXiv 2405.04434, 2.1).

Hugging Face's names are those of Transformers' modeling_deepseek_v3.py. In Megatron's local layer spec the latents'
norms stand alone; Transformer Engine's fuses them with the up projections (megatron-core 0.16.1,
models/gpt/gpt_layer_specs.py:233). Down projections are replicated over the tensor axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import Attention
from megatron_chord.families.settings import refuse_biases, rope_parameters
from megatron_chord.families.shape import Rope, YarnScaling, refuse, required_value
from megatron_chord.weights.mapping import Rule, both, hf_layer, layer
from megatron_chord.weights.transforms import Same

_LATENT_EPSILON = 1e-6
"""The epsilon of the latents' norms in Transformers, which ignore ``rms_norm_eps``."""


def latent_attention(config: Mapping[str, Any], *, rope: Rope) -> Attention:
    """The attention of this config.json, whose RoPE is ``rope``; ``q_lora_rank`` may be null."""
    refuse_biases(config, "attention_bias")
    refuse(
        config.get("rope_interleave") is False,
        config,
        "rope_interleave false is not supported: Megatron's latent attention rotates neighbouring dimensions",
    )
    refuse(
        not isinstance(rope.scaling, YarnScaling | None),
        config,
        "latent attention has plain RoPE or YaRN",
    )
    refuse(
        required_value(config, "rms_norm_eps") != _LATENT_EPSILON,
        config,
        f"rms_norm_eps {config.get('rms_norm_eps')} is not supported: Transformers computes the latents' norms with "
        f"{_LATENT_EPSILON} all the same, Megatron and vLLM with rms_norm_eps",
    )
    num_heads = required_value(config, "num_attention_heads")
    groups = config.get("num_key_value_heads") or num_heads
    refuse(
        groups != num_heads,
        config,
        f"num_key_value_heads {groups} is not num_attention_heads {num_heads}: every head has its own keys",
    )
    query_rank = config.get("q_lora_rank")
    of_scale: dict[str, Any] = {}
    if isinstance(rope.scaling, YarnScaling):
        # Megatron multiplies the softmax's scale by (0.1 mscale_all_dim log(factor) + 1) squared; so does Transformers.
        of_scale = {
            "rotary_scaling_factor": rope.scaling.factor,
            "mscale_all_dim": float(rope_parameters(config).get("mscale_all_dim") or 0.0),
        }
    return Attention(
        rules=_rules(has_query_latent=query_rank is not None),
        transformer={
            "multi_latent_attention": True,
            "q_lora_rank": query_rank,
            "kv_lora_rank": required_value(config, "kv_lora_rank"),
            "qk_head_dim": required_value(config, "qk_nope_head_dim"),
            "qk_pos_emb_head_dim": required_value(config, "qk_rope_head_dim"),
            "v_head_dim": required_value(config, "v_head_dim"),
            "qk_layernorm": True,
            # Frequencies are scaled in model/rope.py: Megatron's own YaRN rounds otherwise.
            "rope_type": "rope",
            "rotary_base": rope.base,
            **of_scale,
        },
        num_kv_heads=num_heads,
    )


def _rules(*, has_query_latent: bool) -> tuple[Rule, ...]:
    rules = [
        Rule(
            megatron=layer("input_layernorm.weight"), hf=hf_layer("input_layernorm.weight"), transform=Same()
        ),
        *_of_latent("kv", down="kv_a_proj_with_mqa"),
        Rule(
            megatron=layer("self_attention.linear_proj.weight"),
            hf=hf_layer("self_attn.o_proj.weight"),
            transform=Same(axis=1),
        ),
    ]
    if has_query_latent:
        return (*rules, *_of_latent("q", down="q_a_proj"))
    query = Rule(
        megatron=layer("self_attention.linear_q_proj.weight"),
        hf=hf_layer("self_attn.q_proj.weight"),
        transform=Same(axis=0),
    )
    return (*rules, query)


def _of_latent(kind: str, *, down: str) -> list[Rule]:
    """The projection down to a latent, its norm and the projection up."""
    return [
        Rule(
            megatron=layer(f"self_attention.linear_{kind}_down_proj.weight"),
            hf=hf_layer(f"self_attn.{down}.weight"),
            transform=Same(),
        ),
        Rule(
            megatron=both(
                f"self_attention.{kind}_layernorm.weight",
                f"self_attention.linear_{kind}_up_proj.layer_norm_weight",
            ),
            hf=hf_layer(f"self_attn.{kind}_a_layernorm.weight"),
            transform=Same(),
        ),
        Rule(
            megatron=layer(f"self_attention.linear_{kind}_up_proj.weight"),
            hf=hf_layer(f"self_attn.{kind}_b_proj.weight"),
            transform=Same(axis=0),
        ),
    ]
