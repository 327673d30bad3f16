"""A mixture of experts, which replaces the dense MLP in all layers or in some.

Megatron's names (megatron-core 0.16.1): ``local_experts.E.linear_fc1.weight`` of SequentialMLP
(transformer/moe/experts.py:845, in both layer specs), ``linear_fc1.weightE`` of Transformer Engine's grouped linear
layers. Experts are distributed over the expert axis and never split over the tensor axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_chord.families.dense import PRE_MLP_NORM, FeedForward, gated_mlp, gated_mlp_rules
from megatron_chord.families.shape import Experts, refuse, required_value
from megatron_chord.weights.mapping import Rule, hf_layer, layer
from megatron_chord.weights.transforms import Same, Stacked

_EXPERT = "{expert}"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How the router's logits become scores, and how the scores of the chosen experts become weights."""

    function: str = "softmax"
    """softmax or sigmoid. Sigmoid has a bias in fp32, which is not trained and only affects which experts are
    chosen."""
    scale: float = 1.0
    """Factor of all weights."""
    groups: int = 1
    """Number of groups of experts. Each has the same number of experts, in their order."""
    chosen_groups: int = 1
    """Number of groups from which a token's experts may come: those with the largest sums of their best scores."""
    fp32: bool = False
    """True if logits are computed in fp32, independent of the model's dtype."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names in Hugging Face, below a layer and below an expert."""

    block: str = "mlp"
    """Name of the mixture in its layer."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    """Name of the shared expert, which gets every token, below the block."""
    shared_gate: str | None = None
    """Name of the gate of the shared expert; None if it has no gate."""


def mixture(
    config: Mapping[str, Any],
    *,
    experts: Experts,
    width: int,
    normalised: bool,
    scores: Scores | None = None,
    names: Names | None = None,
) -> FeedForward:
    """A mixture whose experts are chosen by the largest scores. ``experts.dense_layers`` keep dense MLPs.

    Args:
        width: width of one expert.
        normalised: whether the scores of the chosen experts are scaled so that their sum is 1.
        scores: default: softmax over all experts.
        names: default: DeepSeek's names.
    """
    scores, names = scores or Scores(), names or Names()
    num_layers = required_value(config, "num_hidden_layers")
    sparse = tuple(layer for layer in range(num_layers) if layer not in experts.dense_layers)
    if not sparse:
        return gated_mlp()
    chosen = required_value(config, "num_experts_per_tok")
    refuse(
        not 1 <= chosen <= experts.count,
        config,
        f"num_experts_per_tok {chosen} of {experts.count} experts",
    )
    refuse(
        normalised and chosen == 1,
        config,
        "one expert per token with normalised weights always has weight 1, so the router would get no gradient",
    )
    refuse(
        scores.function == "sigmoid" and not normalised and chosen > 1,
        config,
        "sigmoid scores of several experts that are not normalised (norm_topk_prob) are not supported: Megatron "
        "normalises them",
    )
    layers = sparse if experts.dense_layers else None
    transformer: dict[str, Any] = {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": width,
        "moe_router_topk": chosen,
        # The softmax of the chosen logits is the normalised choice from the softmax of all.
        "moe_router_pre_softmax": scores.function == "softmax" and not normalised,
        "moe_router_score_function": scores.function,
        "moe_router_topk_scaling_factor": scores.scale if scores.scale != 1 else None,
        "moe_router_dtype": "fp32" if scores.fp32 else None,
        **_group_settings(config, scores, chosen, experts.count),
        "moe_router_enable_expert_bias": scores.function == "sigmoid",
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size,
        "moe_shared_expert_gate": names.shared_gate is not None,
        "moe_layer_freq": [int(number in sparse) for number in range(num_layers)] if layers else 1,
    }
    one = f"{names.block}.experts.{_EXPERT}"
    rules = [
        Rule(
            megatron=layer("mlp.router.weight"), hf=hf_layer(f"{names.block}.gate.weight"), transform=Same()
        ),
        Rule(
            megatron=_expert("linear_fc1"),
            hf=hf_layer(f"{one}.{names.gate}.weight", f"{one}.{names.up}.weight"),
            transform=Stacked(axis=None),
        ),
        Rule(megatron=_expert("linear_fc2"), hf=hf_layer(f"{one}.{names.down}.weight"), transform=Same()),
    ]
    if scores.function == "sigmoid":
        rules.append(
            Rule(
                megatron=layer("mlp.router.expert_bias"),
                hf=hf_layer(f"{names.block}.gate.e_score_correction_bias"),
                transform=Same(),
                dtype=torch.float32,
            )
        )
    if experts.shared_ffn_size is not None:
        rules += _shared_expert(f"{names.block}.{names.shared}")
    if names.shared_gate is not None:
        rules.append(
            Rule(
                megatron=layer("mlp.shared_experts.gate_weight"),
                hf=hf_layer(f"{names.block}.{names.shared_gate}.weight"),
                transform=Same(),
            )
        )
    of_sparse = [replace(rule, layers=layers) for rule in rules]
    dense = gated_mlp_rules(experts.dense_layers) if experts.dense_layers else ()
    return FeedForward(rules=(PRE_MLP_NORM, *of_sparse, *dense), transformer=transformer, experts=experts)


def qwen_dense_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers that Qwen's switches leave a dense MLP (Transformers' modeling_qwen3_moe.py, Qwen3MoeDecoderLayer)."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    num_layers = required_value(config, "num_hidden_layers")
    return tuple(number for number in range(num_layers) if number in only or (number + 1) % step)


def _group_settings(
    config: Mapping[str, Any], scores: Scores, chosen: int, num_experts: int
) -> dict[str, int | None]:
    """Megatron adds up the best ``chosen // chosen_groups`` scores of a group (moe/moe_utils.py:551)."""
    if scores.chosen_groups == scores.groups:
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    refuse(
        num_experts % scores.groups != 0 or not 1 <= scores.chosen_groups <= scores.groups,
        config,
        f"topk_group {scores.chosen_groups} of n_group {scores.groups} groups of {num_experts} experts",
    )
    added = {"sigmoid": 2, "softmax": 1}[scores.function]
    refuse(
        chosen // scores.chosen_groups != added
        or num_experts // scores.groups * scores.chosen_groups < chosen,
        config,
        f"a group of experts counts by its best {added}, but Megatron adds up num_experts_per_tok {chosen} // "
        f"topk_group {scores.chosen_groups} of its {num_experts // scores.groups}",
    )
    return {"moe_router_num_groups": scores.groups, "moe_router_group_topk": scores.chosen_groups}


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
    ]
