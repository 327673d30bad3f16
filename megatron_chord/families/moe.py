"""A mixture of experts in every layer, in place of the dense MLP.

Megatron's names (megatron-core 0.16.1): ``local_experts.E.linear_fc1.weight`` of SequentialMLP
(transformer/moe/experts.py:845, in both layer specs), ``linear_fc1.weightE`` of Transformer Engine's grouped linear
layers. Experts are spread over the expert axis and never cut over the tensor axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import FeedForward
from megatron_chord.families.shape import Experts, refuse, require
from megatron_chord.weights.mapping import Rule, hf_layer, layer
from megatron_chord.weights.transforms import Same, Stacked

_EXPERT = "{expert}"


def mixture(
    config: Mapping[str, Any],
    *,
    experts: Experts,
    width: int,
    normalised: bool,
    block: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> FeedForward:
    """Experts chosen by the largest softmax probabilities.

    Args:
        width: of one expert.
        normalised: the chosen experts' probabilities are scaled to sum to 1.
        block: Hugging Face's name of the mixture in its layer; ``gate``, ``up`` and ``down`` of an expert's parts.
    """
    chosen = require(config, "num_experts_per_tok")
    refuse(
        not 1 <= chosen <= experts.count,
        config,
        f"num_experts_per_tok {chosen} of {experts.count} experts",
    )
    refuse(
        normalised and chosen == 1,
        config,
        "a normalised choice of one expert always weighs 1: nothing would train the router",
    )
    transformer: dict[str, Any] = {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": width,
        "moe_router_topk": chosen,
        # The softmax of the chosen logits is the normalised choice from the softmax of all.
        "moe_router_pre_softmax": not normalised,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size,
        "moe_shared_expert_gate": experts.shared_ffn_size is not None,
    }
    one = f"{block}.experts.{_EXPERT}"
    rules = [
        Rule(
            megatron=layer("pre_mlp_layernorm.weight"),
            hf=hf_layer("post_attention_layernorm.weight"),
            transform=Same(),
        ),
        Rule(megatron=layer("mlp.router.weight"), hf=hf_layer(f"{block}.gate.weight"), transform=Same()),
        Rule(
            megatron=_expert("linear_fc1"),
            hf=hf_layer(f"{one}.{gate}.weight", f"{one}.{up}.weight"),
            transform=Stacked(axis=None),
        ),
        Rule(megatron=_expert("linear_fc2"), hf=hf_layer(f"{one}.{down}.weight"), transform=Same()),
    ]
    if experts.shared_ffn_size is not None:
        rules += _shared_expert(f"{block}.shared_expert")
    return FeedForward(rules=tuple(rules), transformer=transformer, experts=experts)


def refuse_dense_layers(config: Mapping[str, Any]) -> None:
    """Qwen's switches that leave some layers a dense MLP."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    refuse(
        bool(only) or step != 1, config, "a mixture of dense layers and layers of experts is not supported"
    )


def _expert(part: str) -> tuple[str, ...]:
    return (
        *layer(f"mlp.experts.local_experts.{_EXPERT}.{part}.weight"),
        *layer(f"mlp.experts.{part}.weight{_EXPERT}"),
    )


def _shared_expert(name: str) -> list[Rule]:
    return [
        Rule(
            megatron=layer("mlp.shared_experts.linear_fc1.weight"),
            hf=hf_layer(f"{name}.gate_proj.weight", f"{name}.up_proj.weight"),
            transform=Stacked(),
        ),
        Rule(
            megatron=layer("mlp.shared_experts.linear_fc2.weight"),
            hf=hf_layer(f"{name}.down_proj.weight"),
            transform=Same(axis=1),
        ),
        Rule(
            megatron=layer("mlp.shared_experts.gate_weight"),
            hf=hf_layer(f"{name}_gate.weight"),
            transform=Same(),
        ),
    ]
