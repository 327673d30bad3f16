"""Reads tensors, or slices of them, from a Hugging Face folder of safetensors without loading the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class HFReader:
    """Names, shapes and contents of the tensors of one folder; nothing but headers is read ahead of a request."""

    folder: Path
    file_of: dict[str, str]
    _open: dict[str, Any]
    stored_as: Mapping[str, str] = field(default_factory=dict)
    """Names that the files have for tensors, where they are others than ours."""

    @classmethod
    def of(cls, folder: Path) -> HFReader:
        """ValueError when the folder holds no complete safetensors checkpoint."""
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        opened: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            try:
                file_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{folder / INDEX} is no safetensors index: {error!r}") from error
            absent = sorted({name for name in file_of.values() if not (folder / name).is_file()})
            if absent:
                raise ValueError(f"{folder / INDEX} names files that are not there: {', '.join(absent)}")
        elif (folder / SINGLE).is_file():
            opened[SINGLE] = _open_file(folder / SINGLE)
            file_of = dict.fromkeys(opened[SINGLE].keys(), SINGLE)
        else:
            raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there")
        return cls(folder, file_of, opened)

    def renamed(self, stored_as: Mapping[str, str]) -> Self:
        """The same folder under other names: ours -> the files' own.

        ValueError where two tensors of the folder would have one name.
        """
        if len(stored_as) != len(self.file_of):
            lost = sorted(set(self.file_of) - set(stored_as.values()))
            raise ValueError(
                f"{self.folder} holds tensors twice, with and without 'model.': {', '.join(lost[:5])}"
            )
        file_of = {name: self.file_of[stored] for name, stored in stored_as.items()}
        return replace(self, file_of=file_of, stored_as=stored_as)

    @property
    def names(self) -> list[str]:
        return list(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._described(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """ValueError for a dtype that torch's safetensors reader does not know by this name."""
        stated = self._described(name).get_dtype()
        if stated not in SAFETENSORS_DTYPES:
            raise ValueError(f"{self.folder}: {name} is of type {stated}")
        return SAFETENSORS_DTYPES[stated]

    def read(self, name: str, axis: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The tensor on the CPU, or its part [start, stop) along axis 0 or 1; safe to call from several threads.

        The file is opened for this tensor alone: its pages stay in memory only as long as the tensor does.
        """
        file = self.file_of[name]
        part = _slice(_open_file(self.folder / file), self.stored_as.get(name, name), self.folder / file)
        if axis is None:
            return part[:]
        return part[start:stop] if axis == 0 else part[:, start:stop]

    def _described(self, name: str) -> Any:
        file = self.file_of[name]
        if file not in self._open:
            self._open[file] = _open_file(self.folder / file)
        return _slice(self._open[file], self.stored_as.get(name, name), self.folder / file)


def _slice(opened: Any, name: str, path: Path) -> Any:
    try:
        return opened.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
