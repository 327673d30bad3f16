"""How each field of a config.json that Transformers or vLLM reads for these families is treated.

If Transformers or vLLM reads a field that this project ignores, their results differ from Megatron's without an error.
So each field is in one of three places. A family reads it (``KINDS`` has its type). ``NEUTRAL`` lists the
values that change nothing, and every other value is refused. ``IRRELEVANT`` says why it does not matter.
tests/unit/families/test_fields.py takes the list of fields from the sources of both packages.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    text: str
    """A test of a value's type, with a description for errors."""
    fits: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """True if the value is a number that a float can hold. JSON's NaN and Infinity are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


COUNT = Kind("a positive integer", lambda value: _is_integer(value) and value > 0)
INTEGER = Kind("an integer that is not negative", lambda value: _is_integer(value) and value >= 0)
NUMBER = Kind("a positive number", lambda value: _is_number(value) and value > 0)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)
)
INTEGERS = Kind("a list of integers", lambda value: isinstance(value, list) and all(map(_is_integer, value)))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))

KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "moe_intermediate_size",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "moe_layer_freq",
            "decoder_sparse_step",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "first_k_dense_replace",
            "num_nextn_predict_layers",
            "sliding_window",
            "shared_expert_intermediate_size",
        ),
        INTEGER,
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor"), NUMBER),
    **dict.fromkeys(
        (
            "tie_word_embeddings",
            "use_sliding_window",
            "attention_bias",
            "mlp_bias",
            "qkv_bias",
            "norm_topk_prob",
            "rope_interleave",
        ),
        SWITCH,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "scoring_func", "topk_method"), TEXT),
    **dict.fromkeys(("layer_types", "architectures"), TEXTS),
    "mlp_only_layers": INTEGERS,
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), OBJECT),
}
"""Types of the fields that a family, or ``check_fields`` for all families, reads. Null means the same as absent."""

ROPE_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "rope_theta",
            "partial_rotary_factor",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ),
        NUMBER,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim"), Kind("a number", _is_number)),
    **dict.fromkeys(("rope_type", "type"), TEXT),
    "truncate": SWITCH,
    "original_max_position_embeddings": Kind("a positive number", lambda v: _is_number(v) and v > 0),
}
"""Types of the fields in ``rope_parameters`` (``rope_scaling`` before Transformers 5)."""


@dataclass(frozen=True)
class Neutral:
    """A field that may be absent, null or one of ``values``. Every other value is refused."""

    reason: str
    """The reason: what would be computed differently, and by which loader."""
    values: tuple[Any, ...] = ()
    families: tuple[str, ...] = ()
    """The families to which it applies. Empty: all families."""


_OTHER_ATTENTION = "vLLM would compute another attention"
_OTHER_LAYERS = "Transformers would build layers that differ from each other"
_OTHER_HEADS = "vLLM would look for the heads' size there"
_SPARSE = "vLLM would choose the keys that a query sees by an indexer"
_OF_LLAMA = ("llama", "mistral")
NEUTRAL: dict[str, Neutral] = {
    "is_causal": Neutral("Transformers and vLLM would let a token see later ones", (True,)),
    "use_bidirectional_attention": Neutral("vLLM would let a token see later ones", (False,)),
    "is_encoder_decoder": Neutral("it is a model with an encoder", (False,)),
    "quantization_config": Neutral("quantised weights cannot be trained"),
    "compression_config": Neutral("quantised weights cannot be trained"),
    "attention_chunk_size": Neutral("Transformers and vLLM would compute attention in chunks"),
    "dual_chunk_attention_config": Neutral(
        "vLLM would compute attention in chunks, Transformers would not; without the field both compute plain attention"
    ),
    "attn_config": Neutral(_OTHER_ATTENTION),
    "alibi": Neutral("vLLM would add ALiBi to the attention scores", (False,)),
    "position_embedding_type": Neutral(
        "vLLM would take it for another kind of positions", ("rope", "rotary")
    ),
    "position_encoding_type": Neutral("vLLM would take it for another kind of positions", ("rope", "rotary")),
    "rswa_window": Neutral(_OTHER_ATTENTION),
    "compress_ratios": Neutral(_OTHER_ATTENTION),
    "num_kv_shared_layers": Neutral("layers would share keys and values", (0,)),
    "per_layer_config": Neutral(_OTHER_LAYERS),
    "block_configs": Neutral(_OTHER_LAYERS),
    "layers_block_type": Neutral(_OTHER_LAYERS),
    "attn_type_list": Neutral(_OTHER_LAYERS),
    "attention_head_dim": Neutral(_OTHER_HEADS),
    "hidden_size_per_head": Neutral(_OTHER_HEADS),
    "head_dtype": Neutral("vLLM would compute the output head in another dtype", ("model",)),
    "logits_mup_width_multiplier": Neutral("the logits would be scaled", (1, 1.0)),
    "logit_scale": Neutral("vLLM would scale the logits, Transformers would not", (1, 1.0)),
    "qk_norm": Neutral("vLLM would normalise queries and keys, Transformers would not", (False,)),
    "llama_4_scaling": Neutral("vLLM would scale queries by their position, Transformers would not"),
    "ada_rms_norm_t_cond": Neutral("vLLM would condition the norms", (False,)),
    "target_layer_count": Neutral("vLLM would take it for a draft model"),
    "bias": Neutral("vLLM would give attention biases, Transformers would not", (False,)),
    "qkv_bias": Neutral("vLLM would give attention biases, Transformers would not", (False,), _OF_LLAMA),
    "shared_expert_intermediate_size": Neutral(
        "vLLM would add a shared expert, Transformers would not", (0,), ("qwen3_moe",)
    ),
    "moe_router_dtype": Neutral("the router's logits are computed in float32", ("float32",)),
    **dict.fromkeys(
        (
            "index_topk",
            "index_n_heads",
            "index_head_dim",
            "index_topk_freq",
            "index_topk_pattern",
            "index_skip_topk_offset",
            "indexer_rope_interleave",
        ),
        Neutral(_SPARSE),
    ),
    **dict.fromkeys(
        (
            "vision_config",
            "text_config",
            "language_config",
            "thinker_config",
            "encoder_config",
            "joint_head_config",
        ),
        Neutral("it is a model of more than text"),
    ),
    # vLLM takes these old names of other models for RoPE's (transformers_utils/config.py, patch_rope_parameters).
    **dict.fromkeys(
        ("rotary_emb_base", "rotary_pct", "rotary_emb_fraction"),
        Neutral("vLLM would take it for a setting of RoPE, Transformers would not"),
    ),
}

ROPE_NEUTRAL: dict[str, Neutral] = {
    "mrope_section": Neutral("vLLM would compute RoPE over several axes"),
    "mrope_interleaved": Neutral("vLLM would compute RoPE over several axes", (False,)),
    "use_fope": Neutral("vLLM would compute Fourier position embeddings", (False,)),
    "rope_dim": Neutral("vLLM would rotate only a part of the head"),
    "is_deepseek_v4": Neutral("vLLM would compute another RoPE", (False,)),
    "full_attention": Neutral("RoPE that differs between kinds of layers is not supported"),
}

_TRAINING = (
    "it matters only in Transformers' own training mode; here nothing is dropped, jittered or re-initialised"
)
_OUTPUT = "it chooses what else a forward pass returns"
_HEAD = "it belongs to classifiers, poolers or another kind of head"
_MTP = "layers for multi-token prediction are neither trained nor served"
_BOOKKEEPING = "it describes the file or how it is run, not the model"
_OTHER_MODELS = "it is read only for other model types"
IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(
        (
            "attention_dropout",
            "hidden_dropout",
            "router_jitter_noise",
            "initializer_range",
            "router_aux_loss_coef",
            "pretraining_tp",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_cache"),
        _OUTPUT,
    ),
    **dict.fromkeys(
        (
            "classifier_dropout",
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "token_classification_bias",
            "embedding_size",
            "is_matryoshka",
            "matryoshka_dimensions",
            "use_pad_token",
            "use_sep_token",
        ),
        _HEAD,
    ),
    **dict.fromkeys(
        (
            "mtp_hidden_states_first",
            "mtp_layer_types",
            "mtp_mlp_layer_types",
            "mtp_num_hidden_layers",
            "mtp_per_layer_config",
            "chain_hidden_post_norm",
            "n_predict",
        ),
        _MTP,
    ),
    "mlp_layer_types": "Transformers checks it, and these families' layers do not read it",
    **dict.fromkeys(
        (
            "dtype",
            "transformers_version",
            "name_or_path",
            "keys",
            "get",
            "sub_configs",
            "is_heterogeneous",
            "chunk_size_feed_forward",
            "model_max_length",
            "_attn_implementation",
            "_experts_implementation",
            "_is_quantized",
        ),
        _BOOKKEEPING,
    ),
    "max_window_layers": "sliding windows are refused",
    "bos_token_id": "prompts are made by the chat template",
    "qk_head_dim": "Transformers computes it from the two parts of a head",
    "ada_rms_norm_t_cond_dim": "ada_rms_norm_t_cond is refused",
    "unpadded_vocab_size": "Transformers reads it only for models whose class needs it, which none of these does",
    **dict.fromkeys(
        (
            "vision_n_layers",
            "_dsv4_vl_inner",
            "transf_decoder",
            "encoder",
            "model",
            "multi_query",
            "new_decoder_architecture",
            "num_layers",
            "is_mm_prefix_lm",
            "mamba_chunk_size",
            "chunk_size",
            "canvas_length",
            "backbone_hidden_size",
        ),
        _OTHER_MODELS,
    ),
}

_LATENT_ALONE = "vLLM reads it only for latent attention"
_REFUSED_TYPES = "it belongs to types of RoPE scaling that are refused"
_OF_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_OF_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_LATENT: dict[str, str] = {
    "head_dim": "Transformers replaces it by qk_rope_head_dim",
    **dict.fromkeys((f"rope_parameters.{name}" for name in _OF_LLAMA3), _REFUSED_TYPES),
}
UNREAD: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), _LATENT_ALONE)
        | dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers"), _MTP)
        | dict.fromkeys((f"rope_parameters.{name}" for name in _OF_YARN), _REFUSED_TYPES),
    ),
    "deepseek_v2": dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), _MTP) | _LATENT,
    "deepseek_v3": _LATENT,
}
"""Fields that are irrelevant only in some families, by family."""

ROPE_IRRELEVANT: dict[str, str] = dict.fromkeys(
    (
        "short_factor",
        "long_factor",
        "short_mscale",
        "long_mscale",
        "alpha",
        "mixed_b",
        "max_trained_positions",
        "fope_sep_head",
        "fope_init_factor",
        "num_inv_freq",
        "num_key_value_heads",
    ),
    _REFUSED_TYPES,
)

ALIASES: dict[str, dict[str, str]] = {
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
}
"""Second names of fields (attribute_map of Transformers' configuration classes)."""

TOKEN_FIELDS = ("eos_token_id", "pad_token_id")


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise ValueError with every field that has a wrong type or would make a loader compute something else."""
    findings = [*_wrong_kinds(config), *_not_neutral(config), *_token_ids(config)]
    if findings:
        listed = findings[0] if len(findings) == 1 else "\n  " + "\n  ".join(findings)
        raise ValueError(f"config.json of model_type {config.get('model_type')!r}: {listed}")


def one_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with second names replaced. Raises ValueError if both names are present and differ."""
    renamed = dict(config)
    for alias, name in ALIASES.get(config.get("model_type", ""), {}).items():
        value = renamed.pop(alias, None)
        if value is None:
            continue
        if renamed.get(name) not in (None, value):
            raise ValueError(
                f"config.json of model_type {config['model_type']!r}: {alias} {value!r} and {name} "
                f"{renamed[name]!r} mean the same and differ"
            )
        renamed[name] = value
    return renamed


def _wrong_kinds(config: Mapping[str, Any]) -> Iterator[str]:
    for fields, kinds, prefix in _levels(config, KINDS, ROPE_KINDS):
        for name, kind in kinds.items():
            value = fields.get(name)
            if value is not None and not kind.fits(value):
                yield f"{prefix}{name} must be {kind.text}, not {_shown(value)}"


def _not_neutral(config: Mapping[str, Any]) -> Iterator[str]:
    for fields, neutral, prefix in _levels(config, NEUTRAL, ROPE_NEUTRAL):
        for name, rule in neutral.items():
            value = fields.get(name)
            if value is None or (rule.families and config.get("model_type") not in rule.families):
                continue
            # 1 == True, and 0 == False: the type counts, too.
            if not any(value == allowed and type(value) is type(allowed) for allowed in rule.values):
                yield f"{prefix}{name} {_shown(value)} is not supported: {rule.reason}"


def _token_ids(config: Mapping[str, Any]) -> Iterator[str]:
    stated = config.get("vocab_size")
    vocab_size = stated if _is_integer(stated) else math.inf
    for name in TOKEN_FIELDS:
        value = config.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not _is_integer(token):
                yield f"{name} must be an integer or a list of integers, not {_shown(value)}"
            elif token is not None and token >= vocab_size:
                yield f"{name} {token} is beyond the vocabulary of {vocab_size}"


def _levels(config: Mapping[str, Any], top: Any, below: Any) -> Iterator[tuple[Mapping[str, Any], Any, str]]:
    yield config, top, ""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, dict):
            yield rope, below, f"{name}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
