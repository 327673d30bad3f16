"""Megatron's multi-head latent attention, made of exactly the parts that the layer spec names."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentAttention(MLASelfAttention):
    """``MLASelfAttention``, the same under every version of Megatron-Core.

    0.19.2 replaces parts of the spec (transformer/mla_qk_norm_config.py). Where queries have no latent
    (``q_lora_rank`` null, as in DeepSeek-V2-Lite), it puts a norm into the queries' projection that the model does not
    have, and without Transformer Engine it refuses such models. 0.16.1 takes the parts as they are, and so does this.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Called by 0.19.2's constructor; 0.16.1 has no such step."""
        parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {part: getattr(submodules, part) for part in parts}
