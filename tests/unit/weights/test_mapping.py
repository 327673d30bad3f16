"""The table names every tensor of a model exactly once, under Hugging Face's and under Megatron's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_chord.families.table import FAMILIES
from megatron_chord.weights.mapping import WeightMap, check_accounting, padded_vocab_size

LAYERS = 12  # two digits, so that layers 1 and 11 differ


def qwen2_config(**changes: Any) -> dict[str, Any]:
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        **changes,
    )
    return config.to_dict()


def qwen2_map(**changes: Any) -> WeightMap:
    return FAMILIES["qwen2"](qwen2_config(**changes)).weights


@pytest.mark.parametrize("tied", [False, True])
def test_the_names_are_those_of_transformers(tied: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**qwen2_config(tie_word_embeddings=tied)))
    expected = {name for name, _ in model.named_parameters()}  # a tied head is not a second parameter
    names = list(qwen2_map(tie_word_embeddings=tied).hf_names())
    assert len(names) == len(set(names))
    assert set(names) == expected
    assert ("lm_head.weight" in names) != tied


@pytest.mark.parametrize("layer", [0, 1, 11])
def test_entries_by_hand(layer: int) -> None:
    weights = qwen2_map()
    qkv = weights.entry(f"decoder.layers.{layer}.self_attention.linear_qkv.weight")
    assert qkv.hf == tuple(f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "qkv")
    fc1 = weights.entry(f"decoder.layers.{layer}.mlp.linear_fc1.weight")
    assert fc1.hf == (
        f"model.layers.{layer}.mlp.gate_proj.weight",
        f"model.layers.{layer}.mlp.up_proj.weight",
    )
    # The norm has one name in the local layer spec and another in Transformer Engine's.
    for name in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        entry = weights.entry(f"decoder.layers.{layer}.{name}")
        assert entry.hf == (f"model.layers.{layer}.input_layernorm.weight",)
        assert entry.rule.transform.axis is None


@pytest.mark.parametrize(
    ("tied", "hf", "exported"), [(False, "lm_head.weight", True), (True, "model.embed_tokens.weight", False)]
)
def test_the_head(tied: bool, hf: str, exported: bool) -> None:
    entry = qwen2_map(tie_word_embeddings=tied).entry("output_layer.weight")
    assert entry.hf == (hf,)
    assert entry.rule.exported == exported
    assert entry.rule.vocab


@pytest.mark.parametrize(
    "name",
    ["decoder.layers.3.mlp.linear_fc3.weight", "decoder.layers.x.mlp.linear_fc1.weight", "lm_head.weight"],
)
def test_an_unknown_parameter_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"no rule maps the Megatron parameter '{name}'"):
        qwen2_map().entry(name)


@pytest.mark.parametrize(
    ("vocab", "tensor", "rows"),
    [
        (203, 1, 208),
        (203, 2, 208),
        (203, 4, 224),
        (256, 1, 256),
        (256, 2, 256),
        (257, 2, 272),
        (151_936, 8, 151_936),
        (17, 4, 32),
    ],
)
def test_padded_vocabulary(vocab: int, tensor: int, rows: int) -> None:
    assert padded_vocab_size(vocab, tensor) == rows


def test_every_missing_and_every_unexpected_name_is_listed_at_once() -> None:
    with pytest.raises(ValueError, match="somewhere does not have this model's tensors") as caught:
        check_accounting(["a", "b", "c"], ["y", "b", "x"], "somewhere")
    assert str(caught.value).splitlines()[1:] == [
        "  missing a",
        "  missing c",
        "  unexpected x",
        "  unexpected y",
    ]
    check_accounting(["a", "b"], ["b", "a"], "somewhere")
