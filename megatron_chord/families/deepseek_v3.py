"""DeepSeek-V3 and R1, and other models with the same architecture (Transformers' modeling_deepseek_v3.py).

Published folders also have layers for multi-token prediction, after those of the model. They are neither read nor
exported, because no forward pass of the model uses them, so they are not trained. Transformers also skips them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder
from megatron_chord.families.latent import latent_attention
from megatron_chord.families.moe import Scores, mixture
from megatron_chord.families.settings import read_rope, refuse_short_window
from megatron_chord.families.shape import Experts, ModelShape, refuse, required_value


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_short_window(config, default=None)
    # Transformers does not read these. vLLM does, and with other values it routes differently.
    for name, default, expected in (
        ("scoring_func", None, "sigmoid"),
        ("topk_method", None, "noaux_tc"),
        ("moe_layer_freq", 1, 1),
    ):
        stated = config.get(name, default)
        refuse(stated != expected, config, f"{name} {stated!r} must be {expected!r}")
    rope = read_rope(config, yarn=True)
    width = required_value(config, "moe_intermediate_size")
    num_shared = required_value(config, "n_shared_experts")
    feed_forward = mixture(
        config,
        experts=Experts(
            count=required_value(config, "n_routed_experts"),
            shared_ffn_size=width * num_shared,
            dense_layers=tuple(range(first_layers(config))),
        ),
        width=width,
        normalised=bool(required_value(config, "norm_topk_prob")),
        scores=Scores(
            function="sigmoid",
            scale=float(required_value(config, "routed_scaling_factor")),
            groups=required_value(config, "n_group"),
            chosen_groups=required_value(config, "topk_group"),
            fp32=True,
        ),
    )
    return decoder(
        config,
        rope=rope,
        attention=latent_attention(config, rope=rope),
        feed_forward=feed_forward,
        num_unread_layers=config.get("num_nextn_predict_layers") or 0,
    )


def first_layers(config: Mapping[str, Any]) -> int:
    """Number of layers at the beginning that have a dense MLP."""
    return min(required_value(config, "first_k_dense_replace"), required_value(config, "num_hidden_layers"))
