"""Published variants of folders are read as Transformers reads them, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chord.families.table import read_shape
from megatron_chord.weights.folder import check_copies, open_model
from megatron_chord.weights.load import load
from megatron_chord.weights.mapping import padded_vocab_size
from tests.support.tiny import save_model

WEIGHTS = "model.safetensors"


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits
    return logits


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the model, by its own name."""
    weights = read_shape(folder).weights
    reader = open_model(folder, weights)
    check_copies(reader, weights)
    return {name: reader.read(name) for name in weights.hf_names()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | config))


def test_a_tied_folder_may_repeat_the_embedding_as_head(tmp_path: Path) -> None:
    """Qwen3-0.6B and 1.7B are published in this form."""
    folder = save_model("qwen3", tmp_path, tied=True, layers=1)
    tensors, logits = load_file(folder / WEIGHTS), transformers_logits(folder)
    embedding = tensors["model.embed_tokens.weight"]
    rewrite(folder, tensors | {"lm_head.weight": embedding.clone()})
    assert torch.equal(transformers_logits(folder), logits)
    assert read(folder).keys() == tensors.keys()

    other = embedding.clone()
    other[7, 3] += 1
    other[200] = torch.nan
    rewrite(folder, tensors | {"lm_head.weight": other})
    with pytest.raises(
        ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight in 2 of 203 rows"
    ):
        read(folder)
    rewrite(folder, tensors | {"lm_head.weight": embedding[:100].clone()})
    with pytest.raises(
        ValueError, match=r"lm_head.weight has shape \(100, 64\), model.embed_tokens.weight \(203, 64\)"
    ):
        read(folder)


def test_transformers_computes_with_both_where_they_differ(tmp_path: Path) -> None:
    """This is why such a folder is refused: its head differs from the embedding, which vLLM would use."""
    folder = save_model("qwen3", tmp_path, tied=True, layers=1)
    tensors, logits = load_file(folder / WEIGHTS), transformers_logits(folder)
    rewrite(folder, tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    assert not torch.allclose(transformers_logits(folder), logits, atol=0.1)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe", "deepseek_v3"])
def test_a_folder_without_the_models_prefix_is_the_same_model(family: str, tmp_path: Path) -> None:
    """``AutoModel.save_pretrained`` writes such a folder. It also holds frequencies, as older folders do."""
    folder = save_model(family, tmp_path, tied=True, layers=2)
    expected, logits = load_file(folder / WEIGHTS), transformers_logits(folder)
    bare = {name.removeprefix("model."): tensor for name, tensor in expected.items()}
    bare |= {"layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(folder, bare, architectures=["AnyModel"])
    torch.testing.assert_close(transformers_logits(folder), logits)
    found = read(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    shape = read_shape(folder)
    rows = padded_vocab_size(shape.vocab_size, 1)
    parameters = {"embedding.word_embeddings.weight": torch.full((rows, 64), torch.nan)}
    reader = open_model(folder, shape.weights)
    load(parameters, shape.weights, reader, vocab_size=shape.vocab_size, tensor_rank=0, tensor_size=1)
    embedding = parameters["embedding.word_embeddings.weight"][: shape.vocab_size]
    assert torch.equal(embedding, expected["model.embed_tokens.weight"])


def test_an_untied_folder_without_its_head_lacks_it(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, layers=1)
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    rewrite(folder, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        read(folder)


def test_a_tensor_may_not_be_there_under_both_names(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, layers=1)
    tensors = load_file(folder / WEIGHTS)
    rewrite(folder, tensors | {"norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(ValueError, match=r"has tensors twice, with and without 'model.': .*norm.weight"):
        read(folder)


def test_swish_is_silu(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, layers=1)
    shape, logits = read_shape(folder), transformers_logits(folder)
    rewrite(folder, load_file(folder / WEIGHTS), hidden_act="swish")
    assert torch.equal(transformers_logits(folder), logits)
    assert read_shape(folder).transformer == shape.transformer
