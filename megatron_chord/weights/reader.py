"""Reads tensors, or slices of them, from a Hugging Face folder of safetensors without loading the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_chord.json_files import read_object
from megatron_chord.weights.advice import of_file, of_folder
from megatron_chord.weights.findings import MAX_SHOWN, listing

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
    """Names, shapes and contents of the tensors of one folder. Only headers are read until a tensor is requested."""

    folder: Path
    file_of: dict[str, str]
    _open: dict[str, Any]
    stored_as: Mapping[str, str] = field(default_factory=dict)
    """Our name -> the name in the files, for tensors whose names differ."""

    @classmethod
    def of(cls, folder: Path) -> HFReader:
        """Open a folder. Raises ValueError if it has no complete safetensors checkpoint."""
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        index, single = folder / INDEX, folder / SINGLE
        if index.is_file():
            file_of = _read_index(index)
            if single.is_file() and set(file_of.values()) != {SINGLE}:
                raise ValueError(
                    f"{folder} has both {SINGLE} and {INDEX}, which lists other files. Transformers would read the "
                    f"first, vLLM the files of the second. Remove {SINGLE}, or remove {INDEX} and its files"
                )
            opened = {file: _open_file(folder / file) for file in sorted(set(file_of.values()))}
            _check_listed_once(index, file_of, opened)
            return cls(folder, file_of, opened)
        if not single.is_file():
            advice = of_folder(folder)
            hint = f"; {advice}" if advice else ""
            raise ValueError(f"{folder} has no weights: it has neither {SINGLE} nor {INDEX}{hint}")
        opened = {SINGLE: _open_file(single)}
        file_of = dict.fromkeys(opened[SINGLE].keys(), SINGLE)
        return cls(folder, file_of, opened)

    def renamed(self, stored_as: Mapping[str, str]) -> Self:
        """The same folder with other tensor names: our name -> name in the files.

        Raises ValueError if two tensors of the folder would get the same name.
        """
        if len(stored_as) != len(self.file_of):
            lost = sorted(set(self.file_of) - set(stored_as.values()))
            raise ValueError(
                f"{self.folder} has tensors twice, with and without 'model.': {', '.join(lost[:5])}"
            )
        file_of = {name: self.file_of[stored] for name, stored in stored_as.items()}
        return replace(self, file_of=file_of, stored_as=stored_as)

    @property
    def names(self) -> list[str]:
        return list(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._described(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype. Raises ValueError if torch's safetensors reader does not know it."""
        stated = self._described(name).get_dtype()
        if stated not in SAFETENSORS_DTYPES:
            raise ValueError(f"{self.folder}: {name} is of type {stated}")
        return SAFETENSORS_DTYPES[stated]

    def read(self, name: str, axis: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read the tensor to the CPU, or its part [start, stop) along axis 0 or 1. Usable from several threads.

        The file is opened separately for each tensor, so that its pages stay in memory only as long as the tensor.
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


def _read_index(path: Path) -> dict[str, str]:
    """Read an index: tensor name -> file in the folder of the index."""
    file_of = read_object(path).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ValueError(f"{path}: weight_map must be an object of tensors and their files")
    for name, file in file_of.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: weight_map gives {name} the file {file!r}; it must be a safetensors file of the same folder"
            )
    absent = sorted({file for file in file_of.values() if not (path.parent / file).is_file()})
    if absent:
        more = f" and {len(absent) - MAX_SHOWN} more" if len(absent) > MAX_SHOWN else ""
        raise ValueError(f"{path} lists files that do not exist: {', '.join(absent[:MAX_SHOWN])}{more}")
    return file_of


def _check_listed_once(index: Path, file_of: Mapping[str, str], opened: Mapping[str, Any]) -> None:
    """Check that no file has a tensor that the index lists for another file."""
    findings = [
        f"{name} is in {file}, too, but the index lists {file_of[name]}"
        for file, headers in opened.items()
        for name in headers.keys()  # noqa: SIM118 (safetensors' reader is no dict)
        if file_of.get(name, file) != file
    ]
    if findings:
        heading = f"{index}: tensors are stored twice, so that programs may load different ones:"
        raise ValueError(listing(heading, findings))


def _slice(opened: Any, name: str, path: Path) -> Any:
    try:
        return opened.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        reason = of_file(path) or error
        raise ValueError(f"{path} is not a readable safetensors file: {reason}") from error
