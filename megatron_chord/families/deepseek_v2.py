"""DeepSeek-V2 and V2-Lite (Transformers' modeling_deepseek_v2.py).

V2's choice among groups of experts (``group_limited_greedy`` of 6 experts from 3 of 8 groups) is not Megatron's and is
refused; V2-Lite chooses among all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.deepseek_v3 import first_layers
from megatron_chord.families.dense import decoder
from megatron_chord.families.latent import latent_attention
from megatron_chord.families.moe import Scores, mixture
from megatron_chord.families.settings import read_rope, refuse_biases, refuse_short_window
from megatron_chord.families.shape import Experts, ModelShape, refuse, required_value


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_biases(config, "mlp_bias")
    refuse_short_window(config, default=None)
    scoring, method = config.get("scoring_func", "softmax"), config.get("topk_method", "greedy")
    refuse(scoring != "softmax", config, f"scoring_func {scoring!r} is not 'softmax'")
    refuse(
        method not in ("greedy", "group_limited_greedy"),
        config,
        f"topk_method {method!r} is neither 'greedy' nor 'group_limited_greedy'",
    )
    freq = config.get("moe_layer_freq", 1)
    refuse(freq != 1, config, f"moe_layer_freq {freq!r} must be 1: Transformers does not read it, vLLM does")
    # Transformers never normalises. vLLM does where it is asked to.
    refuse(bool(config.get("norm_topk_prob")), config, "norm_topk_prob is not supported")
    groups, chosen_groups = config.get("n_group") or 1, config.get("topk_group") or 1
    refuse(
        method == "greedy" and chosen_groups != groups,
        config,
        f"topk_method 'greedy' with topk_group {chosen_groups} of n_group {groups} groups: Transformers would choose "
        "among all experts, vLLM among those groups'",
    )
    rope = read_rope(config, yarn=True)
    width = required_value(config, "moe_intermediate_size")
    feed_forward = mixture(
        config,
        experts=Experts(
            count=required_value(config, "n_routed_experts"),
            shared_ffn_size=width * required_value(config, "n_shared_experts"),
            dense_layers=tuple(range(first_layers(config))),
        ),
        width=width,
        normalised=False,
        scores=Scores(
            scale=float(config.get("routed_scaling_factor", 1.0)),
            groups=groups,
            chosen_groups=chosen_groups,
            fp32=True,
        ),
    )
    return decoder(
        config, rope=rope, attention=latent_attention(config, rope=rope), feed_forward=feed_forward
    )
