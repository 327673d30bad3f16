"""Tensors are read as they are stored. A faulty Hugging Face folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_chord.weights.reader import HFReader


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
