"""Random configurations of every family, drawn from a seed. Some have unusual values.

Half of the settings that a family refuses are drawn now and then. A difference that no error reports would then show.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)
POSITIONS = 64


def draw_config(seed: int) -> dict[str, Any]:
    """Draw a whole config.json. Consecutive seeds go through the families."""
    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    heads = rng.choice((1, 2, 4, 6))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": rng.randint(40, 130),
        "hidden_size": heads * rng.choice((8, 16, 24)),
        "intermediate_size": rng.choice((20, 48, 96)),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([size for size in (1, 2, 3, 6, heads) if heads % size == 0]),
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-3)),
        "tie_word_embeddings": rng.random() < 0.5,
        "hidden_act": rng.choice(("silu", "silu", "silu", "swish")),
        "initializer_range": 0.15,
        "attention_dropout": rng.choice((0.0, 0.1)),
        "bos_token_id": 1,
        "eos_token_id": rng.choice((2, [2, 3])),
        "pad_token_id": rng.choice((None, 0)),
    }
    if family != "qwen3_moe" or rng.random() < 0.5:
        config |= rng.choice(({}, {"head_dim": 16}, {"head_dim": config["hidden_size"] // heads}))
    config |= _rope(rng, family)
    config |= _OF_FAMILY[family](rng, config)
    if rng.random() < 0.25:
        name, value = rng.choice(_RARE)
        config |= {name: value}
        if name == "layer_types":
            config[name] = [rng.choice(value) for _ in range(config["num_hidden_layers"])]
    return config


_RARE: tuple[tuple[str, Any], ...] = (
    ("is_causal", False),
    ("is_causal", True),
    ("sliding_window", 5),
    ("sliding_window", POSITIONS),
    ("use_sliding_window", True),
    ("layer_types", ("full_attention", "sliding_attention")),
    ("layer_types", ("full_attention",)),
    ("partial_rotary_factor", 0.5),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("hidden_act", "gelu"),
    ("rms_norm_eps", "1e-6"),
    ("attention_chunk_size", 4),
    ("num_kv_shared_layers", 0),
)


def _rope(rng: random.Random, family: str) -> dict[str, Any]:
    """Draw RoPE settings, spelt as in Transformers 4 or 5."""
    base = rng.choice((500.0, 1e4, 1e6))
    yarn = {
        "factor": rng.choice((2.0, 4)),
        "original_max_position_embeddings": 32,
        "beta_fast": rng.choice((4, 32)),
        "mscale": (scale := rng.choice((0.7, 1.0))),
        "mscale_all_dim": rng.choice((scale, scale, 0.3)),
    }
    kinds = {
        "default": {},
        "linear": {"factor": rng.choice((2, 3.5))},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": rng.choice((2.0, 4.0)),
            "original_max_position_embeddings": 32,
        },
        "dynamic": {"factor": 2.0},
        "yarn": yarn,
    }
    usual = ("default", "yarn", "yarn") if family.startswith("deepseek") else ("default", "linear", "llama3")
    kind = rng.choice(usual) if rng.random() < 0.9 else rng.choice(sorted(kinds))
    settings = {"rope_type": kind, **kinds[kind]}
    match rng.randrange(4):
        case 0:
            return {"rope_parameters": settings | {"rope_theta": base}}
        case 1:
            return {"rope_theta": base, "rope_scaling": settings if kind != "default" else None}
        case 2:
            settings["type"] = settings.pop("rope_type")
            return (
                {"rope_theta": base, "rope_scaling": settings} if kind != "default" else {"rope_theta": base}
            )
        case _:
            return {"rope_parameters": settings, "rope_theta": base}


def _nothing(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _mistral(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": rng.choice((None, POSITIONS, 4096))}


def _mixtral(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    experts = rng.randint(2, 5)
    return {
        rng.choice(("num_local_experts", "num_experts")): experts,
        "num_experts_per_tok": rng.randint(1, experts),
        "router_jitter_noise": rng.choice((0.0, 0.1)),
    }


def _qwen_moe(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    experts = rng.randint(2, 6)
    layers = config["num_hidden_layers"]
    return {
        "num_experts": experts,
        "num_experts_per_tok": rng.randint(1, experts),
        "moe_intermediate_size": rng.choice((12, 32)),
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice((1, 1, 2)),
        "mlp_only_layers": rng.choice(([], [0], [layers - 1])),
    }


def _qwen3_moe(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    stated = _qwen_moe(rng, config)
    del stated["shared_expert_intermediate_size"]
    return stated


def _latent(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    groups = rng.choice((1, 2, 4))
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": rng.choice((1e-6, 1e-6, 1e-6, 1e-5)),
        "q_lora_rank": rng.choice((None, 20)),
        "kv_lora_rank": rng.choice((12, 24)),
        "qk_nope_head_dim": rng.choice((8, 20)),
        "qk_rope_head_dim": rng.choice((8, 16)),
        "v_head_dim": rng.choice((8, 28)),
        "n_routed_experts": 12,
        "n_shared_experts": rng.choice((1, 2)),
        "moe_intermediate_size": rng.choice((12, 32)),
        "first_k_dense_replace": rng.randint(0, config["num_hidden_layers"]),
        "routed_scaling_factor": rng.choice((1.0, 2.5)),
        "n_group": groups,
        "topk_group": rng.choice([size for size in (1, 2, 4) if size <= groups]),
        "num_experts_per_tok": rng.choice((2, 4)),
    }


def _deepseek_v2(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    return _latent(rng, config) | {"topk_method": rng.choice(("greedy", "group_limited_greedy"))}


def _deepseek_v3(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    return _latent(rng, config) | {
        "norm_topk_prob": rng.choice((True, True, True, False)),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


_OF_FAMILY = {
    "llama": _nothing,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _nothing,
    "qwen2_moe": _qwen_moe,
    "qwen3": _nothing,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}


def save_random_model(seed: int, folder: Path) -> dict[str, Any]:
    """Save the model of ``draw_config(seed)`` with random weights. Its config.json is exactly what was drawn.

    Raises whatever Transformers raises for a configuration that it does not take.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    drawn = draw_config(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**drawn)).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.data.add_(0.1 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(drawn, indent=1))
    return drawn
