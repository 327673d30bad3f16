"""Shards keep to their limit. A written folder reads back, with the other files of its source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.writer import finish_folder, write_shards

# 40, 24, 16, 400, 4 and 4 bytes.
TENSORS = {
    "a": torch.arange(10.0),
    "b": torch.arange(6.0).reshape(2, 3),
    "c": torch.arange(4.0),
    "big": torch.arange(100.0),
    "d": torch.zeros(1),
    "e": torch.arange(2.0, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        (64, [["a", "b"], ["c"], ["big"], ["d", "e"]]),
        (80, [["a", "b", "c"], ["big"], ["d", "e"]]),
        (1, [["a"], ["b"], ["c"], ["big"], ["d"], ["e"]]),
        (10_000, [["a", "b", "c", "big", "d", "e"]]),
    ],
)
def test_shards_keep_to_their_limit(tmp_path: Path, limit: int, files: list[list[str]]) -> None:
    placed = write_shards(iter(TENSORS.items()), tmp_path, prefix="part", shard_bytes=limit)
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"part-{i:05d}.safetensors" for i in range(1, len(files) + 1)]
    assert [sorted(load_file(path)) for path in paths] == [sorted(names) for names in files]
    assert placed == {
        name: (f"part-{i:05d}.safetensors", TENSORS[name].nbytes)
        for i, names in enumerate(files, start=1)
        for name in names
    }


def test_a_shard_ends_where_its_header_or_its_alignment_does(tmp_path: Path) -> None:
    odd = {"three": torch.arange(3.0, dtype=torch.bfloat16), "four": torch.arange(4.0)}
    placed = write_shards(odd.items(), tmp_path, prefix="odd")
    assert [file for file, _ in placed.values()] == ["odd-00001.safetensors", "odd-00002.safetensors"]
    many = {f"{'long' * 100}.{index}": torch.zeros(1) for index in range(300)}  # a header of 300 x 500 bytes
    placed = write_shards(many.items(), tmp_path, prefix="many")
    files = sorted({file for file, _ in placed.values()})
    assert len(files) == 3
    read = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert all(read[name].equal(tensor) for name, tensor in many.items())


@pytest.mark.parametrize("limit", [64, 10_000])
def test_a_finished_folder_reads_back_and_holds_the_other_files(tmp_path: Path, limit: int) -> None:
    source, folder = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    folder.mkdir()
    kept = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    kept += ["LICENSE", "README.md", "qwen.tiktoken", "vocab.bpe", "generation_config.json", "NOTICE"]
    for name in kept:
        (source / name).write_text(name)
    (source / "config.json").write_text('{"model_type": "qwen2", "torch_dtype": "bfloat16"}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    # A file that describes other weights would be taken for a description of the exported weights.
    stale = [
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
    ]
    stale += [
        "pytorch_model-00001-of-00002.bin",
        "consolidated.00.pth",
        "training_args.bin",
        ".gitattributes",
    ]
    for name in stale:
        (source / name).write_text(name)
    (source / "runs").mkdir()
    # Neither the source's weights are copied nor its index, which names files that are not here.
    save_file({"old": torch.zeros(1)}, source / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"old": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    placed = write_shards(TENSORS.items(), folder, prefix="model", shard_bytes=limit)
    finish_folder(folder, source, placed, dtype=torch.float32)

    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.startswith("model")} == {*kept, "additional_chat_templates"}
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert all((folder / name).read_text() == name for name in kept if name != "config.json")
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "qwen2", "dtype": "float32", "architectures": ["Qwen2ForCausalLM"]}
    if limit == 64:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 40 + 24 + 16 + 400 + 4 + 4
    else:
        assert {name for name in names if name.startswith("model")} == {"model.safetensors"}
    reader = HFReader.of(folder)
    assert sorted(reader.names) == sorted(TENSORS)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in TENSORS.items())
    assert all(reader.read(name).dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_the_template_of_the_training_goes_with_the_policy(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    folder.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": "</s>"}')
    placed = write_shards(TENSORS.items(), folder, prefix="model")
    finish_folder(folder, source, placed, dtype=torch.float32, chat_template="new")
    assert (folder / "chat_template.jinja").read_text() == "new"
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
