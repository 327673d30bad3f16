"""Writes a Hugging Face folder that Transformers and vLLM load as it is, from tensors that arrive one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_chord.weights.reader import INDEX, SINGLE

SHARD_BYTES = 4 * 2**30


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, prefix: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, tuple[str, int]]:
    """Write safetensors files ``prefix-00001.safetensors``, ... of at most ``shard_bytes`` (or one tensor) each.

    Returns name -> (file, bytes). Peak memory is one shard.
    """
    placed: dict[str, tuple[str, int]] = {}
    for number, shard in enumerate(_shards(tensors, shard_bytes), start=1):
        file = f"{prefix}-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed |= {name: (file, tensor.nbytes) for name, tensor in shard.items()}
    return placed


def finish_folder(
    folder: Path,
    source: Path,
    placed: Mapping[str, tuple[str, int]],
    *,
    dtype: torch.dtype,
    chat_template: Path | None = None,
) -> None:
    """Name the shards in the index, and copy what else a checkpoint holds (configs, tokenizer, template) over.

    config.json is made to state ``dtype``, the one the weights are written in; ``chat_template`` (a Jinja file)
    replaces the source's own.
    """
    if len({file for file, _ in placed.values()}) == 1:
        (folder / next(iter(placed.values()))[0]).rename(folder / SINGLE)
    else:
        index = {
            "metadata": {"total_size": sum(size for _, size in placed.values())},
            "weight_map": {name: file for name, (file, _) in sorted(placed.items())},
        }
        _write_json(folder / INDEX, index)
    copy_settings(source, folder)
    config = json.loads((folder / "config.json").read_text())
    stated = config.pop("torch_dtype", None)  # what Transformers before 5 called it
    name = str(dtype).removeprefix("torch.")
    if config.get("dtype", stated) != name:
        _write_json(folder / "config.json", config | {"dtype": name})
    if chat_template is not None:
        shutil.copy2(chat_template, folder / "chat_template.jinja")
        path = folder / "tokenizer_config.json"
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings.pop("chat_template", None)
            _write_json(path, settings)


def copy_settings(source: Path, folder: Path) -> None:
    """Copy what a Hugging Face folder holds beside its weights: configs, tokenizer, template."""
    for file in source.iterdir():
        if file.is_file() and file.suffix in {".json", ".model", ".txt", ".jinja"} and file.name != INDEX:
            shutil.copy2(file, folder / file.name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.cpu()
        size += tensor.nbytes
    if shard:
        yield shard
