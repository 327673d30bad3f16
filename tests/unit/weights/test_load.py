"""Loading fills every local parameter with its slices, in small pieces. Faulty folders are refused before any copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_chord.families.table import FAMILIES
from megatron_chord.weights.load import load
from megatron_chord.weights.reader import HFReader

HIDDEN, FFN, HEADS, GROUPS, DIM, VOCAB, LAYERS = 16, 12, 4, 2, 4, 21, 2
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}


def hf_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        rows = {"q": HEADS * DIM, "k": GROUPS * DIM, "v": GROUPS * DIM}
        shapes |= {f"{start}self_attn.{kind}_proj.weight": (count, HIDDEN) for kind, count in rows.items()}
        shapes |= {f"{start}self_attn.{kind}_proj.bias": (count,) for kind, count in rows.items()}
        shapes |= {
            f"{start}self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
            f"{start}mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{start}mlp.up_proj.weight": (FFN, HIDDEN),
            f"{start}mlp.down_proj.weight": (HIDDEN, FFN),
            f"{start}input_layernorm.weight": (HIDDEN,),
            f"{start}post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes


def write_folder(folder: Path, tensors: dict[str, Tensor]) -> HFReader:
    save_file(tensors, folder / "model.safetensors")
    return HFReader.of(folder)


def fill(parameters: dict[str, Tensor], reader: HFReader, *, rank: int = 0, size: int = 1) -> None:
    weights = FAMILIES["qwen2"](CONFIG).weights
    load(parameters, weights, reader, vocab_size=VOCAB, tensor_rank=rank, tensor_size=size)


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in hf_shapes().items()}


def local_parameters(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The parameters of one tensor-parallel rank of Megatron's model, filled with NaN. The vocabulary has 24 or 32 rows
    in all."""
    rows = {1: 24, 2: 32, 4: 32}[size] // size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (rows, HIDDEN),
        "output_layer.weight": (rows, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        start = f"decoder.layers.{layer}."
        shapes |= {
            f"{start}input_layernorm.weight": (HIDDEN,),
            f"{start}pre_mlp_layernorm.weight": (HIDDEN,),
            f"{start}self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * DIM // size, HIDDEN),
            f"{start}self_attention.linear_qkv.bias": ((HEADS + 2 * GROUPS) * DIM // size,),
            f"{start}self_attention.linear_proj.weight": (HIDDEN, HEADS * DIM // size),
            f"{start}mlp.linear_fc1.weight": (2 * FFN // size, HIDDEN),
            f"{start}mlp.linear_fc2.weight": (HIDDEN, FFN // size),
        }
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_parameter_of_a_rank(tmp_path: Path, size: int, rank: int) -> None:
    tensors = random_tensors()
    parameters = local_parameters(size)
    fill(parameters, write_folder(tmp_path, tensors), rank=rank, size=size)

    def part(name: str, axis: int = 0) -> Tensor:
        return tensors[name].chunk(size, axis)[rank]

    rows = len(parameters["output_layer.weight"])
    for megatron, hf in {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
    }.items():
        padded = torch.zeros(rows * size, HIDDEN)
        padded[:VOCAB] = tensors[hf]
        assert torch.equal(parameters[megatron], padded[rank * rows : (rank + 1) * rows])
    assert torch.equal(parameters["decoder.final_layernorm.weight"], tensors["model.norm.weight"])
    for layer in range(LAYERS):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            # Rows go group by group: two query heads, their key head and their value head, with DIM rows each.
            heads = [
                tensors[f"{theirs}self_attn.{letter}_proj.{kind}"].split(DIM)[head]
                for group in range(rank * GROUPS // size, (rank + 1) * GROUPS // size)
                for letter, head in [("q", 2 * group), ("q", 2 * group + 1), ("k", group), ("v", group)]
            ]
            assert torch.equal(parameters[f"{ours}self_attention.linear_qkv.{kind}"], torch.cat(heads))
        gate, up = (part(f"{theirs}mlp.{name}_proj.weight") for name in ("gate", "up"))
        assert torch.equal(parameters[f"{ours}mlp.linear_fc1.weight"], torch.cat([gate, up]))
        assert torch.equal(
            parameters[f"{ours}mlp.linear_fc2.weight"], part(f"{theirs}mlp.down_proj.weight", 1)
        )
        assert torch.equal(
            parameters[f"{ours}self_attention.linear_proj.weight"],
            part(f"{theirs}self_attn.o_proj.weight", 1),
        )
        for megatron, hf in {
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
        }.items():
            assert torch.equal(parameters[f"{ours}{megatron}.weight"], tensors[f"{theirs}{hf}.weight"])


def test_a_rank_may_hold_nothing_but_padding(tmp_path: Path) -> None:
    """21 tokens are on four ranks of 8 rows: the third rank holds 5, the fourth none."""
    tensors = random_tensors()
    reader = write_folder(tmp_path, tensors)
    for rank, held in [(2, 5), (3, 0)]:
        parameters = {"output_layer.weight": local_parameters(4)["output_layer.weight"]}
        fill(parameters, reader, rank=rank, size=4)
        head = parameters["output_layer.weight"]
        assert torch.equal(head[:held], tensors["lm_head.weight"][8 * rank :])
        assert torch.equal(head[held:], torch.zeros(8 - held, HIDDEN))


def test_dtypes_are_converted(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    parameters = local_parameters(1, torch.float32)
    fill(parameters, write_folder(tmp_path, tensors))
    assert torch.equal(parameters["decoder.final_layernorm.weight"], tensors["model.norm.weight"].float())


class RecordingReader(HFReader):
    """A reader that keeps the number of elements of every tensor that it returns."""

    def read(self, name: str, axis: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        tensor = super().read(name, axis, start, stop)
        READ.append((name, tensor.numel()))
        return tensor


READ: list[tuple[str, int]] = []


def test_only_this_ranks_slices_are_read_each_once(tmp_path: Path) -> None:
    write_folder(tmp_path, random_tensors())
    parameters = local_parameters(2)
    READ.clear()
    fill(parameters, RecordingReader.of(tmp_path), rank=1, size=2)
    assert sorted(name for name, _ in READ) == sorted(hf_shapes())
    whole = {name: torch.Size(shape).numel() for name, shape in hf_shapes().items()}
    for name, elements in READ:
        replicated = "norm" in name
        vocabulary = "embed" in name or "lm_head" in name
        # A vocabulary of 21 is on two ranks of 16 rows. The second holds 5.
        expected = whole[name] if replicated else 5 * HIDDEN if vocabulary else whole[name] // 2
        assert elements == expected, name
    # So the largest local parameter is the most that is read at any time.
    assert max(elements for _, elements in READ) <= max(p.numel() for p in parameters.values())


def test_wrong_names_are_listed_all_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors |= {"extra.weight": torch.zeros(1), "model.layers.2.mlp.up_proj.weight": torch.zeros(1)}
    parameters = local_parameters(1)
    with pytest.raises(ValueError, match="does not have this model's tensors") as caught:
        fill(parameters, write_folder(tmp_path, tensors))
    assert str(caught.value).splitlines()[1:] == [
        "  missing model.layers.1.mlp.up_proj.weight",
        "  missing model.norm.weight",
        "  unexpected extra.weight",
        "  unexpected model.layers.2.mlp.up_proj.weight",
    ]
    assert all(parameter.isnan().all() for parameter in parameters.values())


def test_wrong_shapes_are_listed_all_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = random_tensors() | {
        "model.norm.weight": torch.zeros(HIDDEN + 1),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(FFN, HIDDEN + 2),
        "model.layers.1.self_attn.k_proj.bias": torch.zeros(GROUPS * DIM + 1),
        "lm_head.weight": torch.zeros(VOCAB + 4, HIDDEN),
        "model.embed_tokens.weight": torch.zeros(VOCAB - 1, HIDDEN),
    }
    parameters = local_parameters(1)
    with pytest.raises(ValueError, match=r"disagree with its config\.json") as caught:
        fill(parameters, write_folder(tmp_path, tensors))
    findings = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0].strip() for line in findings) == [
        "decoder.final_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    ]
    assert any("(16,), from model.norm.weight: (17,)" in line for line in findings)
    # Megatron's 24 rows could be filled from the larger one, and 20 rows could be padded. Neither would be this model.
    assert any("a vocabulary of 21, but lm_head.weight has 25 rows" in line for line in findings)
    assert all(parameter.isnan().all() for parameter in parameters.values())


def test_what_cannot_be_cut_in_equal_parts_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors() | {"model.layers.0.mlp.down_proj.weight": torch.zeros(HIDDEN, FFN + 1)}
    with pytest.raises(ValueError, match=r"down_proj.* cannot be cut in 2 equal parts along axis 1"):
        fill(local_parameters(2), write_folder(tmp_path, tensors), rank=0, size=2)
