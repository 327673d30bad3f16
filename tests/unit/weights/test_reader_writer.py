"""Faulty Hugging Face folders are refused, and written folders are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.writer import finish_folder, write_shards


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def write_index(folder: Path, **file_of: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


def test_reads_one_file(tmp_path: Path) -> None:
    tensor = numbered(6, 4)
    save_file({"a": tensor, "b": numbered(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    reader = HFReader.of(tmp_path)
    assert sorted(reader.names) == ["a", "b"]
    assert reader.shape("a") == (6, 4)
    assert torch.equal(reader.read("a"), tensor)
    assert torch.equal(reader.read("a", 0, 2, 5), tensor[2:5])
    assert torch.equal(reader.read("a", 1, 1, 3), tensor[:, 1:3])
    assert reader.read("a", 0, 6, 6).shape == (0, 4)
    assert reader.read("b").dtype == torch.bfloat16


def test_reads_what_an_index_names(tmp_path: Path) -> None:
    save_file({"a": numbered(2)}, tmp_path / "x.safetensors")
    save_file({"b": numbered(3), "unlisted": numbered(4)}, tmp_path / "y.safetensors")
    write_index(tmp_path, a="x.safetensors", b="y.safetensors")
    reader = HFReader.of(tmp_path)
    assert reader.names == ["a", "b"]
    assert (reader.read("a").tolist(), reader.read("b").tolist()) == ([0, 1], [0, 1, 2])


def test_every_file_of_an_index_must_be_readable(tmp_path: Path) -> None:
    save_file({"a": numbered(2)}, tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"something else")
    write_index(tmp_path, a="x.safetensors", b="y.safetensors")
    with pytest.raises(ValueError, match=r"y\.safetensors is not a readable safetensors file"):
        HFReader.of(tmp_path)


def test_a_tensor_may_not_be_in_two_files_of_an_index(tmp_path: Path) -> None:
    """Transformers and vLLM would load the copy of the last file, whatever the index says."""
    save_file({"a": numbered(2), "c": numbered(4)}, tmp_path / "x.safetensors")
    save_file({"b": numbered(3), "c": numbered(4)}, tmp_path / "y.safetensors")
    write_index(tmp_path, a="x.safetensors", b="y.safetensors", c="x.safetensors")
    with pytest.raises(
        ValueError, match=r"stored twice.*: c is in y\.safetensors, too, but .* lists x\.safetensors$"
    ):
        HFReader.of(tmp_path)


def test_all_absent_files_of_an_index_are_named(tmp_path: Path) -> None:
    save_file({"a": numbered(2)}, tmp_path / "x.safetensors")
    write_index(tmp_path, a="x.safetensors", b="z.safetensors", c="y.safetensors", d="y.safetensors")
    with pytest.raises(ValueError, match=r"lists files that do not exist: y\.safetensors, z\.safetensors$"):
        HFReader.of(tmp_path)


def test_an_index_that_places_a_tensor_in_the_wrong_file(tmp_path: Path) -> None:
    save_file({"a": numbered(2)}, tmp_path / "x.safetensors")
    write_index(tmp_path, b="x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: .*b"):
        HFReader.of(tmp_path).shape("b")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "..", 3, None, ["x"]]
)
def test_an_index_that_leaves_its_folder(tmp_path: Path, file: object) -> None:
    save_file({"a": numbered(2)}, tmp_path / "x.safetensors")
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map gives a the file .* of the same folder$"):
        HFReader.of(tmp_path / "in")


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"weight_map": ["a"]}', '{"weight_map": 3}', "{}", "[" * 9999, "\xff"]
)
def test_an_index_of_another_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^\S+index\.json[: ].*$"):
        HFReader.of(tmp_path)


def test_a_single_file_beside_an_old_index_is_refused(tmp_path: Path) -> None:
    """Transformers reads the single file (modeling_utils.py, _get_resolved_checkpoint_files). vLLM reads the index's
    files."""
    for name, value in (("model", 1), ("x", 2)):
        save_file({"a": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, a="x.safetensors")
    with pytest.raises(ValueError, match=r"has both model\.safetensors and .* Remove"):
        HFReader.of(tmp_path)
    write_index(tmp_path, a="model.safetensors")
    assert HFReader.of(tmp_path).read("a").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("pytorch_model.bin", "save it again with save_pretrained"),
        ("pytorch_model.bin.index.json", "save it again"),
        ("adapter_config.json", "merge_and_unload"),
        ("model-q4.gguf", "GGUF"),
        ("consolidated.00.pth", "publisher's own format"),
    ],
)
def test_other_weights_get_advice(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"has no weights.*{advice}"):
        HFReader.of(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match="git lfs pull"):
        HFReader.of(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": numbered(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        HFReader.of(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="has no weights"):
        HFReader.of(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        HFReader.of(tmp_path / "nowhere")


# 40, 24, 16, 400, 4 and 4 bytes.
TENSORS = {"a": numbered(10), "b": numbered(2, 3), "c": numbered(4), "big": numbered(100), "d": numbered(1)}
TENSORS |= {"e": numbered(2, dtype=torch.bfloat16)}


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
    odd = {"three": numbered(3, dtype=torch.bfloat16), "four": numbered(4)}
    placed = write_shards(odd.items(), tmp_path, prefix="odd")
    assert [file for file, _ in placed.values()] == ["odd-00001.safetensors", "odd-00002.safetensors"]
    many = {f"{'long' * 100}.{index}": numbered(1) for index in range(300)}  # a header of 300 x 500 bytes
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
    save_file({"old": numbered(1)}, source / "model-00001-of-00001.safetensors")
    write_index(source, old="model-00001-of-00001.safetensors")
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
