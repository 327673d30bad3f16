"""Each family's table and settings agree with Transformers. A refused config.json gets the reason."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import ParallelConfig, data_parallel_size
from megatron_chord.families.shape import Experts, LinearScaling, Llama3Scaling, ModelShape, Rope
from megatron_chord.families.table import FAMILIES, LACKING, model_shape, read_shape
from megatron_chord.model.build import check_shape
from megatron_chord.model.rope import scaled_frequencies
from megatron_chord.weights.reader import HFReader
from tests.support.tiny import FAMILIES as TINY
from tests.support.tiny import LLAMA3_ROPE, YARN_ROPE, save_model

LAYERS = 2
LATENT = ("deepseek_v2", "deepseek_v3")
ALL = sorted(FAMILIES)


def config(family: str, **changes: Any) -> dict[str, Any]:
    """A config.json as Transformers 5 writes it. The value ``ABSENT`` leaves a key out."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    sizes |= TINY[family]
    stated: dict[str, Any] = AutoConfig.for_model(family, **sizes).to_diff_dict()
    return {name: value for name, value in (stated | sizes | changes).items() if value is not ABSENT}


ABSENT = object()


def shape_of(family: str, **changes: Any) -> ModelShape:
    return model_shape(config(family, **changes))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ALL)
def test_the_names_are_those_of_the_folder(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path, tied=tied, layers=LAYERS)
    shape = read_shape(folder)
    names = list(shape.weights.hf_names())
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(HFReader.of(folder).names)
    assert shape.tied == tied
    assert shape.family == family


@pytest.mark.parametrize("family", ALL)
def test_both_layer_specs_name_the_same_tensors(family: str) -> None:
    """Each rule's Megatron names, with numbers filled in, find the rule's tensors again."""
    shape = shape_of(family, num_hidden_layers=12)
    for rule in shape.weights.rules:
        for layer in rule.layers or (2, 11):
            for name in rule.megatron:
                numbered = name.replace("{layer}", str(layer)).replace("{expert}", "3")
                entry = shape.weights.entry(numbered)
                assert entry.rule is rule
                assert entry.hf == tuple(
                    hf.replace("{layer}", str(layer)).replace("{expert}", "3") for hf in rule.hf
                )


def test_names_of_experts_in_both_layer_specs() -> None:
    weights = shape_of("mixtral").weights
    start = "decoder.layers.1.mlp"
    w1_w3 = tuple(f"model.layers.1.block_sparse_moe.experts.3.{w}.weight" for w in ("w1", "w3"))
    for name in (
        f"{start}.experts.local_experts.3.linear_fc1.weight",
        f"{start}.experts.linear_fc1.weight3",
    ):
        assert weights.entry(name).hf == w1_w3
    assert weights.entry(f"{start}.router.weight").hf == ("model.layers.1.block_sparse_moe.gate.weight",)
    assert weights.entry("decoder.layers.1.pre_mlp_layernorm.weight").hf == (
        "model.layers.1.post_attention_layernorm.weight",
    )


ROPES: list[tuple[dict[str, Any], Rope]] = [
    ({"rope_parameters": ABSENT}, Rope(base=10_000.0)),
    ({"rope_parameters": ABSENT, "rope_theta": 5e5, "rope_scaling": None}, Rope(base=5e5)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 7.0}, Rope(base=5e5)),
    (
        {
            "rope_parameters": ABSENT,
            "rope_theta": 5e5,
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 8192,
            },
        },
        Rope(
            base=5e5,
            scaling=Llama3Scaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
            ),
        ),
    ),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        Rope(base=5e5, scaling=LinearScaling(factor=2.0)),
    ),
]


@pytest.mark.parametrize(("changes", "expected"), ROPES)
def test_rope_in_the_spelling_of_transformers_4_and_5(changes: dict[str, Any], expected: Rope) -> None:
    from transformers import AutoConfig

    stated = config("llama", **changes)
    assert FAMILIES["llama"](stated).rope == expected
    theirs = AutoConfig.for_model(**stated).rope_parameters
    assert theirs["rope_theta"] == expected.base
    assert (theirs["rope_type"] == "default") == (expected.scaling is None)


@pytest.mark.parametrize("family", ALL)
def test_the_base_where_none_is_stated_is_that_of_transformers(family: str) -> None:
    from transformers import AutoConfig

    stated = config(family, rope_parameters=ABSENT)
    assert FAMILIES[family](stated).rope.base == AutoConfig.for_model(**stated).rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3_ROPE,
        LLAMA3_ROPE | {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_scaled_frequencies_are_those_of_transformers_bit_for_bit(
    scaling: dict[str, Any], head_dim: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = config("llama", head_dim=head_dim, rope_parameters=dict(scaling))
    expected, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        LlamaConfig(**stated), torch.device("cpu")
    )
    rope = FAMILIES["llama"](stated).rope
    # Megatron-Core begins in the same way (rotary_pos_embedding.py:85).
    plain = 1.0 / (rope.base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    assert rope.scaling is not None
    assert torch.equal(scaled_frequencies(plain, rope), expected)
    assert not torch.equal(plain, expected)
    assert attention == 1.0


DEEPSEEK_V3_ROPE = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("rope", "head_dim", "base"),
    [
        (YARN_ROPE, 16, 1e4),
        (DEEPSEEK_V3_ROPE, 64, 1e4),
        (DEEPSEEK_V3_ROPE | {"factor": 32.0, "beta_fast": 1.0}, 64, 5e4),  # Kimi K2 has no ramp
        (DEEPSEEK_V3_ROPE | {"beta_fast": 7, "beta_slow": 0.5}, 64, 1e4),
        (DEEPSEEK_V3_ROPE | {"mscale": 0.707, "mscale_all_dim": 0.707}, 128, 1e4),
    ],
)
def test_yarn_is_that_of_transformers_bit_for_bit(rope: dict[str, Any], head_dim: int, base: float) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    stated = config("deepseek_v3", rope_parameters=ABSENT, rope_scaling=rope, rope_theta=base)
    stated |= {
        "qk_rope_head_dim": head_dim,
        "head_dim": head_dim,
        "max_position_embeddings": 163_840,
        "_attn_implementation": "eager",
    }
    shape = FAMILIES["deepseek_v3"](stated)
    loaded = DeepseekV3Config(**stated)
    embedding = theirs.DeepseekV3RotaryEmbedding(loaded)
    assert embedding.attention_scaling == 1.0
    # Megatron-Core begins in the same way (rotary_pos_embedding.py:85).
    plain = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    assert torch.equal(scaled_frequencies(plain, shape.rope), embedding.inv_freq)
    assert not torch.equal(plain, embedding.inv_freq)

    # Megatron computes this scale of the softmax (multi_latent_attention.py:141).
    settings = shape.transformer
    stretch = 0.1 * settings["mscale_all_dim"] * math.log(settings["rotary_scaling_factor"]) + 1.0
    width = settings["qk_head_dim"] + settings["qk_pos_emb_head_dim"]
    scaling = theirs.DeepseekV3Attention(loaded, 0).scaling
    assert stretch * stretch / math.sqrt(width) == pytest.approx(scaling, rel=1e-12)


def refusals() -> Iterator[Any]:
    def case(family: str, reason: str, **changes: Any) -> Any:
        return pytest.param(family, changes, reason, id=f"{family} {' '.join(changes)}")

    for family in ALL:
        yield case(family, "hidden_act 'gelu' is not silu", hidden_act="gelu")
        yield case(family, "quantised weights", quantization_config={"quant_method": "fp8"})
        yield case(family, "rms_norm_eps must be a positive number, not '1e-6'", rms_norm_eps="1e-6")
        yield case(family, "hidden_size must be a positive integer, not 64.0", hidden_size=64.0)
        yield case(family, "tie_word_embeddings must be true or false", tie_word_embeddings="false")
        yield case(family, "rope_theta must be a positive number", rope_parameters={"rope_theta": "1e4"})
        yield case(family, "is_causal False is not supported", is_causal=False)
        yield case(
            family, "would compute RoPE over several axes", rope_parameters={"mrope_section": [4, 2, 2]}
        )
        yield case(family, "pad_token_id 50 is beyond the vocabulary", pad_token_id=50)
        yield case(family, "eos_token_id 51 is beyond the vocabulary", eos_token_id=[1, 51])
        yield case(family, "differ from each other", per_layer_config={"0": {"head_dim": 8}})
        yield case(family, "layer_types names sliding_attention", layer_types=["sliding_attention"] * LAYERS)
        stretched = "stretches queries" if family in LATENT else "type 'yarn'"
        yield case(family, stretched, rope_parameters={"rope_type": "yarn", "factor": 4.0})
        yield case(family, "partial_rotary_factor 0.5", partial_rotary_factor=0.5)
        yield case(family, "has no 'rms_norm_eps'", rms_norm_eps=ABSENT)
        heads = "is not num_attention_heads" if family in LATENT else "no multiple of 3 key-value heads"
        yield case(family, heads, num_key_value_heads=3)
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    yield case("qwen3", "differs between kinds of layers", rope_parameters=nested)
    without_factor = {name: value for name, value in LLAMA3_ROPE.items() if name != "factor"}
    yield case("llama", "positive 'factor', got None", rope_parameters=without_factor)
    swapped = LLAMA3_ROPE | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}
    yield case("llama", "low_freq_factor 4.0 must lie", rope_parameters=swapped)
    for family in ("llama", "mistral"):
        yield case(family, "attention_bias is not supported", attention_bias=True)
        yield case(family, "mlp_bias is not supported", mlp_bias=True)
        yield case(family, "qkv_bias True is not supported: vLLM would give", qkv_bias=True)
    for family in ("llama", "deepseek_v2", "deepseek_v3"):
        yield case(family, "window of 8 is shorter", sliding_window=8)
    for family in ("qwen2", "qwen2_moe"):
        yield case(family, "head_dim 32 is not supported: vLLM takes", head_dim=32)
    yield case("qwen2_moe", "qkv_bias false is not supported", qkv_bias=False)
    yield case("qwen2", "in chunks, Transformers would not", dual_chunk_attention_config={"chunk_size": 4})
    yield case("mixtral", "num_experts 8 and num_local_experts 4 mean the same and differ", num_experts=8)
    for family in ("qwen3", "qwen3_moe"):
        yield case(family, "attention_bias is not supported", attention_bias=True)
    for family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        yield case(family, "sliding-window", use_sliding_window=True, layer_types=ABSENT)
        yield case(family, "sliding-window", layer_types=["full_attention", "sliding_attention"])
        # vLLM, and Qwen3-MoE in Transformers, give every layer the window. They ignore layer_types.
        full = ["full_attention"] * LAYERS
        yield case(
            family,
            "window of 8 is shorter",
            use_sliding_window=True,
            sliding_window=8,
            layer_types=full,
        )
    for family in ("mistral", "mixtral"):
        yield case(family, "window of 511 is shorter than the model's 512 positions", sliding_window=511)
    yield case(
        "mistral", "the window of 4096 is shorter", sliding_window=ABSENT, max_position_embeddings=32_768
    )
    for family in ("qwen2_moe", "qwen3_moe"):
        yield case(family, "decoder_sparse_step must be a positive integer, not 0", decoder_sparse_step=0)
        yield case(family, "num_experts_per_tok 5 of 4", num_experts_per_tok=5)
        yield case(family, "so the router would get no gradient", num_experts_per_tok=1, norm_topk_prob=True)
    yield case("mixtral", "so the router would get no gradient", num_experts_per_tok=1)
    yield from deepseek_refusals(case)


def deepseek_refusals(case: Callable[..., Any]) -> Iterator[Any]:
    for family in LATENT:
        yield case(family, "attention_bias is not supported", attention_bias=True)
        yield case(family, "latents' norms with 1e-06 all the same", rms_norm_eps=1e-5)
        yield case(family, "plain RoPE or YaRN", rope_parameters=LLAMA3_ROPE)
        yield case(family, "YaRN with truncate false", rope_parameters=YARN_ROPE | {"truncate": False})
        for unequal in ({"mscale": 0.7}, {"mscale_all_dim": 0.0}, {"attention_factor": 1.0}):
            yield case(family, "stretches queries and keys", rope_parameters=YARN_ROPE | unequal)
        yield case(family, "has no 'kv_lora_rank'", kv_lora_rank=ABSENT)
        yield case(family, "moe_layer_freq 2 must be 1", moe_layer_freq=2)
        yield case(family, "num_experts_per_tok 13 of", num_experts_per_tok=13)
    yield case("deepseek_v3", "rope_interleave false is not supported", rope_interleave=False)
    yield case("deepseek_v3", "scoring_func None must be 'sigmoid'", scoring_func=ABSENT)
    yield case("deepseek_v3", "topk_method 'greedy' must be 'noaux_tc'", topk_method="greedy")
    yield case("deepseek_v3", "norm_topk_prob) are not supported", norm_topk_prob=False)
    yield case(
        "deepseek_v3", "by its best 2, but Megatron adds up num_experts_per_tok 6 // ", num_experts_per_tok=6
    )
    yield case("deepseek_v3", "topk_group 2 of n_group 5 groups of 12 experts", n_group=5)
    yield case("deepseek_v2", "mlp_bias is not supported", mlp_bias=True)
    yield case("deepseek_v2", "topk_method 'noaux_tc' is neither", topk_method="noaux_tc")
    yield case("deepseek_v2", "scoring_func 'sigmoid' is not", scoring_func="sigmoid")
    yield case("deepseek_v2", "topk_method 'greedy' with topk_group 1 of n_group 2 groups", n_group=2)
    yield case("deepseek_v2", "norm_topk_prob is not supported", norm_topk_prob=True)
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "n_routed_experts": 160}
    yield case("deepseek_v2", "best 1, but Megatron adds up", num_experts_per_tok=6, **groups)


@pytest.mark.parametrize(("family", "changes", "reason"), list(refusals()))
def test_refused_with_the_reason(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        shape_of(family, **changes)
    assert f"model_type {family!r}" in str(caught.value)


@pytest.mark.parametrize("family", LACKING)
def test_what_megatron_lacks_is_named(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=f"cannot compute model_type '{family}'. It lacks:") as caught:
        read_shape(tmp_path)
    assert "embeddings times sqrt(hidden_size)" in str(caught.value)


def test_megatron_still_lacks_it() -> None:
    """Megatron-Core's classes still lack what some of the reasons name. A release that adds it fails here."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    settings = [field.name for field in dataclasses.fields(TransformerConfig)]
    assert not [
        name for name in settings if re.search("soft_?cap|embedding_(scale|multiplier)|rope_local", name)
    ]
    places = [field.name for field in dataclasses.fields(TransformerLayerSubmodules) if "norm" in field.name]
    assert places == ["input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm"]


def test_windows_that_do_nothing_are_accepted() -> None:
    for family in ("mistral", "mixtral"):
        for window in (None, 512, 4096):
            shape_of(family, sliding_window=window)
    shape_of("mistral", sliding_window=ABSENT)
    shape_of("qwen2", use_sliding_window=True, layer_types=["full_attention"] * LAYERS)


def test_what_transformers_fills_in() -> None:
    assert shape_of("llama", num_key_value_heads=ABSENT).num_kv_heads == 4
    assert shape_of("llama", head_dim=None).transformer["kv_channels"] == 16
    assert shape_of("qwen3", head_dim=ABSENT).transformer["kv_channels"] == 128
    assert shape_of("qwen3_moe", num_local_experts=ABSENT, num_experts=8).experts == Experts(count=8)
    assert shape_of("qwen2_moe").experts == Experts(count=4, shared_ffn_size=32)
    assert shape_of("llama", hidden_act="swish").transformer == shape_of("llama").transformer


def test_which_layers_stay_dense() -> None:
    """The rule of Transformers' Qwen3MoeDecoderLayer and DeepseekV3DecoderLayer decides which layers are dense."""
    for changes, dense in (
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3, 4)),
        ({"mlp_only_layers": [0, 4, 9]}, (0, 4)),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, ()),
    ):
        for family in ("qwen2_moe", "qwen3_moe"):
            experts = shape_of(family, num_hidden_layers=6, **changes).experts
            assert experts is not None
            assert experts.dense_layers == dense
    shape = shape_of("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=3)
    assert shape.experts == Experts(count=12, shared_ffn_size=48, dense_layers=(0, 1, 2))
    assert shape.transformer["moe_layer_freq"] == [0, 0, 0, 1, 1, 1]
    for family, changes in (
        ("qwen3_moe", {"decoder_sparse_step": 7}),
        ("deepseek_v3", {"first_k_dense_replace": 6}),
    ):
        assert shape_of(family, num_hidden_layers=6, **changes).experts is None


def test_layers_for_multi_token_prediction_are_not_read() -> None:
    weights = shape_of("deepseek_v3", num_nextn_predict_layers=1).weights
    names = list(weights.hf_names())
    found = [
        *names,
        f"model.layers.{LAYERS}.eh_proj.weight",
        f"model.layers.{LAYERS}.mlp.experts.3.up_proj.weight",
    ]
    weights.check_folder(found, "somewhere")
    with pytest.raises(ValueError, match=f"unexpected model.layers.{LAYERS + 1}.eh_proj.weight"):
        weights.check_folder([*found, f"model.layers.{LAYERS + 1}.eh_proj.weight"], "somewhere")
    none = shape_of("deepseek_v3", num_nextn_predict_layers=0).weights
    with pytest.raises(ValueError, match=f"unexpected model.layers.{LAYERS}.eh_proj.weight"):
        none.check_folder(found, "somewhere")


@pytest.mark.parametrize("family", ALL)
def test_frequencies_that_older_folders_keep_are_not_read(family: str) -> None:
    weights = shape_of(family).weights
    found = [
        *weights.hf_names(),
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
    ]
    weights.check_folder(found, "somewhere")
    with pytest.raises(ValueError, match=r"unexpected model.layers.9.self_attn.rotary_emb.inv_freq"):
        weights.check_folder([*found, "model.layers.9.self_attn.rotary_emb.inv_freq"], "somewhere")


@pytest.mark.parametrize(
    ("family", "parallel", "reason"),
    [
        ("qwen3", {"expert": 2}, "qwen3 has no experts to distribute"),
        ("mixtral", {"expert": 3}, "4 experts / parallel.expert 3"),
        ("mixtral", {"tensor": 2}, "only with parallel.sequence_parallel"),
        ("qwen2_moe", {"tensor": 4, "sequence_parallel": True}, "2 key-value heads / tensor 4"),
        ("llama", {"tensor": 4}, "2 key-value heads / tensor 4 (parallel.tensor can be 1, 2 for this model)"),
        (
            "deepseek_v3",
            {"tensor": 2},
            "latent attention) over a tensor axis only with parallel.sequence_parallel",
        ),
        ("deepseek_v3", {"expert": 5}, "12 experts / parallel.expert 5"),
    ],
)
def test_layouts_that_do_not_fit(family: str, parallel: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_shape(shape_of(family), ParallelConfig(**parallel))


def test_the_expert_axis_divides_a_pipeline_stage() -> None:
    assert data_parallel_size(ParallelConfig(tensor=2, sequence_parallel=True, expert=4), 8) == 4
    with pytest.raises(ValueError, match="expert 4 does not divide the 2 processes of a pipeline stage"):
        data_parallel_size(ParallelConfig(pipeline=2, expert=4), 4)
