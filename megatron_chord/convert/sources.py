"""Folders that a model can be read from: Hugging Face's safetensors, or a distributed checkpoint. Both give parameters.

A source is checked when it is opened: names, shapes and dtypes of everything that the configuration asks for, with all
findings in one error. What follows can only fail for the disk's sake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_chord.convert.layout import Layout, Stored, layout_of, without_padding
from megatron_chord.convert.stream import METADATA, Checkpoint
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.weights.findings import listing
from megatron_chord.weights.folder import check_copies, open_model
from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.transforms import merged_shape

HF = "hf"
_HELD_EXACTLY = {torch.float32: (torch.float32, torch.bfloat16, torch.float16)}
"""What a dtype of a rule's own may be read from."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BESIDE_THE_MODEL = ("optimizer.", "rng", "rerun_state_machine_state")


class Source(Protocol):
    @property
    def folder(self) -> Path: ...

    @property
    def configuration(self) -> Path:
        """The folder with config.json and the tokenizer's files."""
        ...

    @property
    def shape(self) -> ModelShape: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of every tensor whose rule names no other."""
        ...

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of Megatron's parameter, multiples of its transform's unit; without padding rows."""
        ...

    def tensors(self, stored: Stored) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors that the parameter is made of, by name."""
        ...


def open_source(folder: Path, configuration: Path | None = None) -> Source:
    """Either kind. ``configuration`` replaces a Megatron folder's own ``hf/``, and is needed where it has none.

    Raises:
        ValueError: with all findings, one a line.
    """
    if (folder / METADATA).is_file():
        return MegatronSource.of(folder, configuration or folder / HF)
    if configuration is not None:
        raise ValueError(
            f"{folder} is no distributed checkpoint ({METADATA} is not there): it has its own config"
        )
    return HFSource.of(folder)


@dataclass(frozen=True, kw_only=True)
class HFSource:
    folder: Path
    shape: ModelShape
    layout: Layout
    dtype: torch.dtype
    reader: HFReader

    @classmethod
    def of(cls, folder: Path) -> HFSource:
        shape = read_shape(folder)
        reader = open_model(folder, shape.weights)
        check_copies(reader, shape.weights)
        dtypes, own = {name: reader.dtype(name) for name in shape.weights.hf_names()}, shape.weights.dtypes()
        dtype = _only_dtype({name: found for name, found in dtypes.items() if name not in own}, folder)
        findings = [
            f"{name} is of type {dtypes[name]}, which {wanted} does not hold exactly"
            for name, wanted in own.items()
            if dtypes[name] not in _HELD_EXACTLY[wanted]
        ]
        if findings:
            raise ValueError(f"{folder}:\n  " + "\n  ".join(findings))
        layout = layout_of(shape)
        _check_shapes(layout, shape, reader)
        return cls(folder=folder, shape=shape, layout=layout, dtype=dtype, reader=reader)

    @property
    def configuration(self) -> Path:
        return self.folder

    @property
    def left_out(self) -> list[str]:
        """Tensors of the folder that are no part of the model."""
        known = set(self.shape.weights.hf_names())
        return [name for name in self.reader.names if name not in known]

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        transform, of = stored.entry.rule.transform, without_padding(stored, self.shape.vocab_size).shape[0]
        wanted = transform.rows(min(start, of), min(stop, of), of)
        parts = [
            self.reader.read(name, 0, part.start, part.stop)
            for name, part in zip(stored.entry.hf, wanted, strict=True)
        ]
        return transform.merge(parts).to(stored.dtype(self.dtype))

    def tensors(self, stored: Stored) -> Iterator[tuple[str, Tensor]]:
        for name in stored.entry.hf:
            yield name, self.reader.read(name).to(stored.dtype(self.dtype))


@dataclass(frozen=True, kw_only=True)
class MegatronSource:
    """A checkpoint of any layout; a training checkpoint's optimizer state is passed over."""

    folder: Path
    configuration: Path
    shape: ModelShape
    layout: Layout
    dtype: torch.dtype
    checkpoint: Checkpoint

    @classmethod
    def of(cls, folder: Path, configuration: Path) -> MegatronSource:
        shape, checkpoint = read_shape(configuration), Checkpoint(folder)
        layout = layout_of(shape)
        dtype = _check_checkpoint(checkpoint, layout, shape)
        return cls(
            folder=folder,
            configuration=configuration,
            shape=shape,
            layout=layout,
            dtype=dtype,
            checkpoint=checkpoint,
        )

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        """Holds one piece of what the checkpoint was written in besides the rows."""
        stored = without_padding(stored, self.shape.vocab_size)
        stop = min(stop, stored.shape[0])
        found = torch.empty(max(stop - start, 0), *stored.shape[1:], dtype=stored.dtype(self.dtype))
        each = stored.shape[0] // len(stored.boxes)
        while start < stop:
            until = min(stop, (start // each + 1) * each)
            box = stored.box(start, until)
            part = found[len(found) - (stop - start) :][: until - start]
            self.checkpoint.read(box, part.view(box.shape))
            start = until
        return found

    def tensors(self, stored: Stored) -> Iterator[tuple[str, Tensor]]:
        parameter = self.rows(stored, 0, stored.shape[0])
        yield from zip(stored.entry.hf, stored.entry.rule.transform.split(parameter), strict=True)


def _check_shapes(layout: Layout, shape: ModelShape, reader: HFReader) -> None:
    findings = []
    for stored in layout.parameters:
        stored = without_padding(stored, shape.vocab_size)
        sources = ", ".join(f"{name} {reader.shape(name)}" for name in stored.entry.hf)
        found = merged_shape(stored.entry.rule.transform, [reader.shape(name) for name in stored.entry.hf])
        if isinstance(found, str):
            findings.append(f"{stored.entry.megatron} cannot be made of {sources}: {found}")
        elif found != stored.shape:
            findings.append(f"{stored.entry.megatron} has shape {stored.shape}, but {sources} make {found}")
    if findings:
        raise ValueError(listing(f"shapes in {reader.folder} disagree with its config.json:", findings))


def _check_checkpoint(checkpoint: Checkpoint, layout: Layout, shape: ModelShape) -> torch.dtype:
    """The checkpoint's dtype, when it holds the layout's tensors and no others of a model."""
    stored = {key: (whole, dtype) for key, whole, dtype in checkpoint.tensors()}
    model = {key: value for key, value in stored.items() if not key.startswith(_BESIDE_THE_MODEL)}
    wanted: dict[str, tuple[int, ...]] = {
        box.key: box.whole for parameter in layout.parameters for box in parameter.boxes
    }
    vocab = {box.key for p in layout.parameters if p.entry.rule.vocab for box in p.boxes}
    findings = [f"missing {key}" for key in wanted if key not in model]
    findings += [f"unexpected {key}" for key in model if key not in wanted]
    for key in wanted.keys() & model.keys():
        found, _ = model[key]
        is_padded = key in vocab and found[0] >= shape.vocab_size and found[1:] == wanted[key][1:]
        if found != wanted[key] and not is_padded:
            findings.append(f"{key} has shape {found}, the config says {wanted[key]}")
    if findings:
        raise ValueError(
            listing(f"{checkpoint.folder} does not hold this model's tensors:", sorted(findings))
        )
    own = {box.key for p in layout.parameters if p.entry.rule.dtype is not None for box in p.boxes}
    return _only_dtype({key: model[key][1] for key in wanted if key not in own}, checkpoint.folder)


def _only_dtype(dtypes: Mapping[str, torch.dtype], folder: Path) -> torch.dtype:
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    found = next(iter(dtypes.values()))
    if len(kinds) > 1 or found not in _DTYPES:
        rare = [f"{name} is {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items()]
        raise ValueError(
            f"{folder}: tensors must all be float32, all bfloat16 or all float16, they are {', '.join(kinds)}:\n  "
            + "\n  ".join(sorted(rare)[:10])
        )
    return found
