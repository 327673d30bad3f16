"""A Hugging Face folder as one model's: its tensors under the names that the model's table has for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_chord.weights.mapping import WeightMap
from megatron_chord.weights.reader import HFReader

_ROWS = 4096
"""Of two tensors, compared at a time."""


def open_model(folder: Path, weights: WeightMap) -> HFReader:
    """The folder's tensors by the table's names; only headers are read.

    Raises:
        ValueError: no complete safetensors checkpoint, or not this model's tensors.
    """
    reader = HFReader.of(folder)
    reader = reader.renamed(weights.canonical(reader.names))
    weights.check_folder(reader.names, str(folder))
    return reader


def check_copies(reader: HFReader, weights: WeightMap) -> None:
    """ValueError where a tensor that the folder holds besides differs from the one that it repeats.

    Reads both, some thousand rows at a time.
    """
    for copy, original in weights.copies.items():
        if copy not in reader.file_of:
            continue
        shapes = [reader.shape(name) for name in (copy, original)]
        reason = (
            f"config.json ties them (tie_word_embeddings), so {copy} should repeat {original}. vLLM would compute with "
            f"{original} alone, Transformers with each of them. Set tie_word_embeddings to false in config.json if the "
            f"model has a head of its own, or delete {copy} if it has not"
        )
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{reader.folder}: {copy} has shape {shapes[0]}, {original} {shapes[1]}: {reason}"
            )
        num_rows = shapes[0][0]
        differing = 0
        for start in range(0, num_rows, _ROWS):
            ours, theirs = (
                reader.read(name, 0, start, min(start + _ROWS, num_rows)) for name in (copy, original)
            )
            differing += int(_differing_rows(ours, theirs))
        if differing:
            raise ValueError(
                f"{reader.folder}: {copy} differs from {original} in {differing} of {num_rows} rows: {reason}"
            )


def _differing_rows(one: Tensor, other: Tensor) -> Tensor:
    """Rows whose bits differ: NaN is equal to NaN, and 0.0 is not -0.0."""
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    return (one.view(torch.uint8) != other.view(torch.uint8)).any(dim=1).sum()
