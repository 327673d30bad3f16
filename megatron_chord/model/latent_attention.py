"""Megatron's multi-head latent attention, built from exactly the submodules of the layer spec."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentAttention(MLASelfAttention):
    """``MLASelfAttention`` that behaves the same with every version of Megatron-Core.

    0.19.2 replaces submodules of the spec (transformer/mla_qk_norm_config.py). If queries have no latent
    (``q_lora_rank`` null, as in DeepSeek-V2-Lite), it adds a norm to the queries' projection that the model does not
    have, and without Transformer Engine it refuses such models. 0.16.1 does not change the spec, and neither does this
    class.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Called by 0.19.2's constructor; 0.16.1 has no such step."""
        parts = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {part: getattr(submodules, part) for part in parts}
