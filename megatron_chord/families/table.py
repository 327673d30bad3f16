"""The table of model families. A new family is one module with a function ``shape``, and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_chord.families import (
    deepseek_v2,
    deepseek_v3,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from megatron_chord.families.fields import check_fields, one_name
from megatron_chord.families.shape import ModelShape
from megatron_chord.json_files import read_object

FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelShape]] = {
    "deepseek_v2": deepseek_v2.shape,
    "deepseek_v3": deepseek_v3.shape,
    "llama": llama.shape,
    "mistral": mistral.shape,
    "mixtral": mixtral.shape,
    "qwen2": qwen2.shape,
    "qwen2_moe": qwen2_moe.shape,
    "qwen3": qwen3.shape,
    "qwen3_moe": qwen3_moe.shape,
}

CAUSAL_LM: dict[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The class that is the family's model with its head: vLLM chooses by it, Transformers by the model type."""

_EMBEDDING_SCALE = (
    "embeddings times sqrt(hidden_size) "
    "(models/common/embeddings/language_model_embedding.py:111 has no such factor)"
)
_NORMS_AFTER = (
    "norms after attention and MLP, before the residual is added (transformer/transformer_layer.py:224: a layer has "
    "only norms before them)"
)
_GEMMA_3 = (
    _EMBEDDING_SCALE,
    _NORMS_AFTER,
    "two RoPE bases that alternate between layers (models/gpt/gpt_model.py:160 has one for all layers)",
)
LACKING: dict[str, tuple[str, ...]] = {
    "gemma": (_EMBEDDING_SCALE,),
    "gemma2": (
        _EMBEDDING_SCALE,
        _NORMS_AFTER,
        "soft-capping of attention scores and logits (no setting of TransformerConfig)",
    ),
    "gemma3": _GEMMA_3,
    "gemma3_text": _GEMMA_3,
}
"""Families that are not supported, with the parts that Megatron-Core 0.16.1's GPT model cannot compute."""


def read_shape(folder: Path) -> ModelShape:
    """The model that ``folder/config.json`` describes.

    Raises:
        ValueError: no such file, not JSON, an unknown model_type, or a setting that the family cannot compute exactly.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: model.path must be a Hugging Face model folder")
    config = read_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{path}: model_type must be a string, it is {model_type!r}")
    if model_type in LACKING:
        lacking = "\n  ".join(LACKING[model_type])
        raise ValueError(
            f"{path}: Megatron-Core 0.16.1 cannot compute model_type {model_type!r}. It lacks:\n  {lacking}"
        )
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{path}: unknown model_type {model_type!r}; known families: {known}")
    try:
        return model_shape(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def serving_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that config.json needs so that vLLM runs the same model as the family.

    Transformers chooses the architecture by the model type, and accepts swish as another name of silu. vLLM does
    neither.
    """
    changes: dict[str, Any] = {}
    architecture = CAUSAL_LM.get(config.get("model_type", ""))
    if architecture is not None and config.get("architectures") != [architecture]:
        changes["architectures"] = [architecture]
    if config.get("hidden_act") == "swish":
        changes["hidden_act"] = "silu"
    return changes


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The model of this config.json, whose model_type is a known one.

    Raises:
        ValueError: a setting has a wrong type, or the family cannot compute it exactly.
    """
    config = one_name(config)
    check_fields(config)
    return FAMILIES[config["model_type"]](config)
