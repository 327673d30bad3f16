"""Loads Hugging Face safetensors into this rank's Megatron parameters: plan, check everything, copy slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_chord.weights.findings import listing
from megatron_chord.weights.mapping import Entry, WeightMap
from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.transforms import merged_shape


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The part [start, stop) of a Hugging Face tensor along ``axis`` that one tensor-parallel rank holds."""

    name: str
    axis: int | None
    start: int
    stop: int


def load(
    parameters: Mapping[str, Tensor],
    weights: WeightMap,
    reader: HFReader,
    *,
    vocab_size: int,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Fill ``parameters`` (global Megatron name -> local tensor) from the folder, converting the dtype.

    All names and shapes of both sides are checked before the first copy. Only this rank's slices are read, one
    parameter at a time. Additional memory: the parts of one local parameter and their merged copy. Padding rows of the
    vocabulary become 0.

    Raises:
        ValueError: listing every missing tensor, unexpected tensor and wrong shape.
    """
    weights.check_folder(reader.names, str(reader.folder))
    plan = {
        name: [_cut(hf, entry, reader, tensor_rank, tensor_size, parameter) for hf in entry.hf]
        for name, parameter in parameters.items()
        for entry in [weights.entry(name)]
    }
    findings = [
        f"{name}: Megatron's shape {tuple(parameter.shape)}, from {', '.join(c.name for c in plan[name])}: {shape}"
        for name, parameter in parameters.items()
        for shape in [_merged_shape(plan[name], weights.entry(name), reader)]
        if not _fits(tuple(parameter.shape), shape, weights.entry(name))
    ] + [
        f"{name}: a vocabulary of {vocab_size}, but {cut.name} has {reader.shape(cut.name)[0]} rows"
        for name, cuts in plan.items()
        for cut in cuts
        if weights.entry(name).rule.vocab and reader.shape(cut.name)[0] != vocab_size
    ]
    if findings:
        raise ValueError(listing(f"shapes in {reader.folder} disagree with its config.json:", findings))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parts = [reader.read(c.name, c.axis, c.start, c.stop) for c in plan[name]]
            merged = weights.entry(name).rule.transform.merge(parts)
            rows = merged.shape[0]
            parameter[:rows].copy_(merged)
            parameter[rows:].zero_()


def _cut(hf: str, entry: Entry, reader: HFReader, rank: int, size: int, parameter: Tensor) -> Cut:
    axis = entry.rule.transform.axis
    shape = reader.shape(hf)
    if axis is None:
        return Cut(name=hf, axis=None, start=0, stop=shape[0])
    if entry.rule.vocab:
        rows = parameter.shape[0]
        return Cut(name=hf, axis=0, start=min(rank * rows, shape[0]), stop=min((rank + 1) * rows, shape[0]))
    if axis >= len(shape) or shape[axis] % size:
        raise ValueError(f"{hf} of shape {shape} cannot be cut in {size} equal parts along axis {axis}")
    part = shape[axis] // size
    return Cut(name=hf, axis=axis, start=rank * part, stop=(rank + 1) * part)


def _merged_shape(cuts: list[Cut], entry: Entry, reader: HFReader) -> tuple[int, ...] | str:
    """The shape of the local parameter, or the reason why the parts do not fit."""
    shapes = []
    for cut in cuts:
        shape = list(reader.shape(cut.name))
        if cut.axis is not None:
            shape[cut.axis] = cut.stop - cut.start
        shapes.append(shape)
    return merged_shape(entry.rule.transform, shapes)


def _fits(parameter: tuple[int, ...], merged: tuple[int, ...] | str, entry: Entry) -> bool:
    if entry.rule.vocab and isinstance(merged, tuple):
        return merged[1:] == parameter[1:] and merged[0] <= parameter[0]
    return parameter == merged
