"""Writes a Hugging Face folder that Transformers and vLLM can load, from an iterator of tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_chord.families.table import serving_config
from megatron_chord.json_files import read_object
from megatron_chord.weights.reader import INDEX, SAFETENSORS_DTYPES, SINGLE

SHARD_BYTES = 4 * 2**30
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


_TEMPLATES = "additional_chat_templates"
_NOT_SETTINGS = (
    ".*",
    # Weights of any format, and their indices.
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.npz"),
    "*.index.json",
    # Adapters, and training state.
    *("adapter_config.json", "adapter_model.*", "trainer_state.json", "optimizer.*", "scheduler.*"),
)


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, prefix: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, tuple[str, int]]:
    """Write safetensors files ``prefix-00001.safetensors``, ... of at most ``shard_bytes`` (or one tensor) each.

    Only one tensor is in memory at a time. The files are on disk (fsync) when this returns.

    Returns:
        tensor name -> (file, bytes).
    """
    placed: dict[str, tuple[str, int]] = {}
    shard: _Shard | None = None
    number = 0
    try:
        for name, tensor in tensors:
            if shard is None or not shard.has_room(name, tensor, shard_bytes):
                if shard is not None:
                    shard.finish()
                number += 1
                shard = _Shard(folder / f"{prefix}-{number:05d}.safetensors")
            shard.add(name, tensor)
            placed[name] = (shard.path.name, tensor.nbytes)
        if shard is not None:
            shard.finish()
    finally:
        if shard is not None:
            shard.file.close()
    return placed


class _Shard:
    """A safetensors file to which tensors are appended one by one. The library's writer needs all of them in memory.

    Format: the length of the header (8 bytes, little-endian); the header (JSON, may be padded with spaces); the
    tensors.
    """

    HEADER_ROOM = 2**16

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")
        self.file.seek(8 + self.HEADER_ROOM)
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = len(json.dumps(self._header))
        self._size = 0

    def has_room(self, name: str, tensor: Tensor, limit: int) -> bool:
        """True if the tensor fits below the limit; always true for the first tensor. Readers need a tensor's offset to
        be a multiple of its element size."""
        header_bytes = self._header_bytes + len(json.dumps(self._entry(name, tensor)))
        return self._size == 0 or (
            self._size + tensor.nbytes <= limit
            and self._size % tensor.itemsize == 0
            and header_bytes <= self.HEADER_ROOM
        )

    def add(self, name: str, tensor: Tensor) -> None:
        entry = self._entry(name, tensor)
        self._header |= entry
        self._header_bytes += len(json.dumps(entry))
        numbers = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self.file.write(numbers.data)
        self._size += tensor.nbytes

    def finish(self) -> None:
        header = json.dumps(self._header).encode()
        self.file.seek(0)
        self.file.write(self.HEADER_ROOM.to_bytes(8, "little") + header.ljust(self.HEADER_ROOM))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _entry(self, name: str, tensor: Tensor) -> dict[str, Any]:
        described = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, self._size + tensor.nbytes],
        }
        return {name: described}


def finish_folder(
    folder: Path,
    source: Path,
    placed: Mapping[str, tuple[str, int]],
    *,
    dtype: torch.dtype,
    chat_template: str | None = None,
) -> None:
    """Number the shards, write their index, and copy the other files of a checkpoint (configs, tokenizer, templates).

    config.json gets ``dtype``, in which the weights are written, and the architecture, by which vLLM chooses its model
    class. ``chat_template`` (Jinja), if given, replaces that of the source.
    """
    files = sorted({file for file, _ in placed.values()})
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    renamed = dict(zip(files, names if len(files) > 1 else [SINGLE], strict=True))
    for file, name in renamed.items():
        (folder / file).rename(folder / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(size for _, size in placed.values())},
            "weight_map": {name: renamed[file] for name, (file, _) in sorted(placed.items())},
        }
        _write_json(folder / INDEX, index)
    copy_settings(source, folder)
    config = read_object(folder / "config.json")
    changes = serving_config(config)
    stated = config.get("dtype", config.get("torch_dtype"))  # the latter before Transformers 5
    name = str(dtype).removeprefix("torch.")
    if stated != name:
        changes["dtype"] = name
    if changes:
        change_config(folder, **changes)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if path.is_file():
            settings = read_object(path)
            settings.pop("chat_template", None)
            _write_json(path, settings)


def change_config(folder: Path, **settings: Any) -> None:
    """Set values in the folder's config.json."""
    config = read_object(folder / "config.json")
    if "dtype" in settings:
        config.pop("torch_dtype", None)
    _write_json(folder / "config.json", config | settings)


def copy_settings(source: Path, folder: Path) -> None:
    """Copy the files of a Hugging Face folder except its weights: configs, tokenizer, templates, license.

    Hidden files, subfolders and files that describe the omitted weights are not copied.
    """
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _NOT_SETTINGS):
            shutil.copy2(file, folder / file.name)
    templates = source / _TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, folder / _TEMPLATES, dirs_exist_ok=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
