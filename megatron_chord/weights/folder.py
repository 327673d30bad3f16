"""Opens a Hugging Face folder as a given model: its tensors under the names of the model's table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_chord.weights.mapping import WeightMap
from megatron_chord.weights.reader import HFReader

_ROWS = 4096
"""Number of rows that are compared at a time."""


def open_model(folder: Path, weights: WeightMap) -> HFReader:
    """The folder's tensors by the names of the table. Only headers are read.

    Raises:
        ValueError: the folder is not a complete safetensors checkpoint, or has other tensors than this model.
    """
    reader = HFReader.of(folder)
    reader = reader.renamed(weights.canonical(reader.names))
    weights.check_folder(reader.names, str(folder))
    return reader


def check_copies(reader: HFReader, weights: WeightMap) -> None:
    """Check that redundant copies of tensors in the folder (a tied head) are equal to their originals.

    Both tensors are read, several thousand rows at a time. Raises ValueError if they differ.
    """
    for copy, original in weights.copies.items():
        if copy not in reader.file_of:
            continue
        shapes = [reader.shape(name) for name in (copy, original)]
        reason = (
            f"config.json ties them (tie_word_embeddings), so {copy} should be equal to {original}. vLLM would use "
            f"only {original}, Transformers would use both. Set tie_word_embeddings to false in config.json if the "
            f"model has a separate head; otherwise delete {copy}"
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
    """Rows whose bits differ: NaN equals NaN, and 0.0 differs from -0.0."""
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    return (one.view(torch.uint8) != other.view(torch.uint8)).any(dim=1).sum()
