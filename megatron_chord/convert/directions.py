"""The functions of tools/convert.py: convert between Hugging Face and Megatron folders, and compare two folders.

A Megatron folder is a ``torch_dist`` checkpoint that Megatron-Core loads with any layout. It also has the Hugging Face
configuration and tokenizer files in ``hf/``, so that it can be converted back without other files. Everything is
checked before anything is written. A folder is written under a hidden name and renamed when it is complete.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_chord.convert.budget import Budget
from megatron_chord.convert.layout import PIECE_BYTES, Piece, Stored, checkpoint_layout, without_padding
from megatron_chord.convert.sources import HF, Source
from megatron_chord.convert.target import atomic_folder
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.weights.findings import listing
from megatron_chord.weights.fp8 import BLOCK, SCALE_SUFFIX, is_quantised, quantise, quantization_config
from megatron_chord.weights.mapping import check_accounting
from megatron_chord.weights.torch_dist import Box, write, write_common
from megatron_chord.weights.writer import change_config, copy_settings, finish_folder, write_shards

SHARD_BYTES = 2**31
"""Maximum size of an exported safetensors file."""
MEMORY_BYTES = 2**30
"""Maximum memory of all tensors that are exported at the same time, unless a single one needs more."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just written; may be called from any thread."""
Notify = Callable[[str], None]
"""Called with a line for the user."""


def default_workers() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def to_megatron(
    source: Source,
    target: Path,
    *,
    progress: Progress = lambda size: None,
    notify: Notify = lambda line: None,
    workers: int | None = None,
) -> None:
    """Write a distributed checkpoint of the source's parameters in its dtype; padding rows of the vocabulary are 0.

    Each of ``workers`` threads reads a piece and writes it to its own file. Memory: two pieces for each worker.

    ``notify`` gets messages about weights that are not finite and about leftovers of killed processes.
    """
    nonfinite: set[str] = set()

    def data(stored: Stored, piece: Piece) -> Tensor:
        rows = source.rows(stored, piece.start, piece.stop)
        if not is_finite(rows):
            nonfinite.update(stored.entry.hf)
        missing = piece.stop - piece.start - len(rows)
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        progress(rows.nbytes)
        return rows

    boxes: dict[Box, Callable[[], Tensor]] = {
        replace(piece.box, dtype=stored.dtype(source.dtype)): functools.partial(data, stored, piece)
        for stored in source.layout.parameters
        for piece in stored.pieces(PIECE_BYTES)
    }
    with atomic_folder(target, notify=notify) as folder:
        write(folder, boxes, objects=dict(source.layout.objects), files=workers or default_workers())
        write_common(folder, {})
        (folder / HF).mkdir()
        copy_settings(source.configuration, folder / HF)
    _report_nonfinite(nonfinite, target, notify)


def to_hf(
    source: Source,
    target: Path,
    *,
    fp8: bool = False,
    progress: Progress = lambda size: None,
    notify: Notify = lambda line: None,
    workers: int | None = None,
) -> None:
    """Write a Hugging Face folder that Transformers and vLLM can load, in the source's dtype.

    Each of ``workers`` threads writes one safetensors file at a time. Memory: at most ``MEMORY_BYTES`` of parameters in
    total, or one parameter that is larger, and one stored piece of the source for each worker; with ``fp8`` three times
    as much.

    Args:
        fp8: block-quantise the matrices of linear layers (``weights/fp8.py``), for engines that load such folders.
        notify: gets messages about weights that are not finite and about leftovers of killed processes.

    Raises:
        ValueError: a matrix cannot be quantised in the form in which engines load it.
    """
    parameters = [
        without_padding(stored, source.shape.vocab_size)
        for stored in source.layout.parameters
        if stored.entry.rule.exported
    ]
    if fp8:
        _check_blocks(parameters)
    names = list(source.shape.weights.hf_names())
    budget = Budget(MEMORY_BYTES)
    nonfinite: set[str] = set()

    def tensors(shard: Sequence[Stored]) -> Iterator[tuple[str, Tensor]]:
        for stored in shard:
            with budget.hold(stored.size(source.dtype)):
                for name, tensor in source.tensors(stored):
                    if not is_finite(tensor):
                        nonfinite.add(name)
                    written = _quantised(stored, name, tensor) if fp8 else {name: tensor}
                    yield from written.items()
                    progress(tensor.nbytes)

    def write_one(number: int, shard: Sequence[Stored], folder: Path) -> dict[str, tuple[str, int]]:
        return write_shards(tensors(shard), folder, prefix=f"part-{number:05d}", shard_bytes=SHARD_BYTES)

    threads = workers or default_workers()
    with atomic_folder(target, notify=notify) as folder, ThreadPoolExecutor(threads) as pool:
        shards = list(_shards(parameters, source.dtype))
        try:
            parts = list(pool.map(write_one, range(len(shards)), shards, [folder] * len(shards)))
        finally:
            pool.shutdown(cancel_futures=True)
        placed = {name: place for part in parts for name, place in part.items()}
        scales = [name for name in placed if name.endswith(SCALE_SUFFIX)] if fp8 else []
        check_accounting([*names, *scales], list(placed), str(folder))
        finish_folder(folder, source.configuration, placed, dtype=source.dtype)
        if fp8:
            kept = [name.removesuffix(".weight") for stored in parameters for name in _kept_matrices(stored)]
            change_config(folder, quantization_config=quantization_config(kept))
    _report_nonfinite(nonfinite, target, notify)


def differences(left: Source, right: Source, *, progress: Progress = lambda size: None) -> Iterator[str]:
    """Yield a line for each difference between two models; nothing if they are the same model.

    Only the settings that the family reads are compared. Weights are compared bit for bit, piece by piece.
    """
    found = [
        f"{field.name}: {getattr(left.shape, field.name)} in {left.folder}, {getattr(right.shape, field.name)} in "
        f"{right.folder}"
        for field in fields(ModelShape)
        if getattr(left.shape, field.name) != getattr(right.shape, field.name) and field.name != "weights"
    ]
    if left.dtype != right.dtype:
        found.append(f"dtype: {left.dtype} in {left.folder}, {right.dtype} in {right.folder}")
    yield from found
    if found:
        return

    def differs(pair: tuple[Stored, Piece]) -> str | None:
        stored, piece = pair
        one, other = (_bits(source.rows(stored, piece.start, piece.stop)) for source in (left, right))
        progress(one.nbytes)
        if one.equal(other):
            return None
        made_of = ", ".join(stored.entry.hf)
        return f"{stored.entry.megatron} ({made_of}) differs in rows {piece.start} to {piece.stop - 1}"

    pieces = [
        (stored, piece)
        for padded in left.layout.parameters
        if padded.entry.rule.exported
        for stored in [without_padding(padded, left.shape.vocab_size)]
        for piece in stored.pieces(PIECE_BYTES)
    ]
    with ThreadPoolExecutor(default_workers()) as pool:
        yield from (line for line in pool.map(differs, pieces) if line is not None)


def plan_of(folder: Path) -> list[Stored]:
    """Every parameter of the model in a folder's config.json, without vocabulary padding. No weight is read."""
    shape = read_shape(folder)
    return [without_padding(stored, shape.vocab_size) for stored in checkpoint_layout(shape).parameters]


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.uint8)


def _shards(parameters: Sequence[Stored], dtype: torch.dtype) -> Iterator[list[Stored]]:
    """Parameters in order, in lists of at most ``SHARD_BYTES`` or one parameter."""
    shard: list[Stored] = []
    size = 0
    for stored in parameters:
        if shard and size + stored.size(dtype) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(stored)
        size += stored.size(dtype)
    if shard:
        yield shard


def _quantised(stored: Stored, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not is_quantised(stored.entry, stored.shape):
        return {name: tensor}
    try:
        numbers, scales = quantise(tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {name: numbers, name + SCALE_SUFFIX: scales}


def _kept_matrices(stored: Stored) -> tuple[str, ...]:
    is_embedding = stored.entry.megatron.startswith("embedding.")
    if len(stored.shape) != 2 or is_embedding or is_quantised(stored.entry, stored.shape):
        return ()
    return stored.entry.hf


def _check_blocks(parameters: Sequence[Stored]) -> None:
    """Check that no FP8 block crosses the border between matrices that vLLM fuses (query, key, value; gate, up)."""
    findings = []
    for stored in parameters:
        transform, of = stored.entry.rule.transform, stored.shape[0]
        if not is_quantised(stored.entry, stored.shape) or len(stored.entry.hf) == 1:
            continue
        for name, part in zip(stored.entry.hf, transform.rows(0, of, of), strict=True):
            if (part.stop - part.start) % BLOCK:
                findings.append(f"{name} has {part.stop - part.start} rows")
    if findings:
        raise ValueError(
            f"FP8 blocks of {BLOCK} x {BLOCK} need multiples of {BLOCK} rows in fused projections:\n  "
            + "\n  ".join(findings)
        )


def is_finite(tensor: Tensor) -> bool:
    """True if all numbers are finite. Makes no copy: minimum and maximum are NaN or infinite if any number is."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _report_nonfinite(names: Collection[str], folder: Path, notify: Notify) -> None:
    if names:
        notify(listing(f"{folder}: {len(names)} tensors have NaN or infinite numbers:", sorted(names)))
