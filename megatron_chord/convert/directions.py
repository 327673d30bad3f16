"""Hugging Face <-> Megatron-Core: plan, check everything, then write into a hidden folder and rename it.

A Megatron folder is a ``torch_dist`` checkpoint that Megatron-Core loads under any layout, with the Hugging Face
configuration and tokenizer files in ``hf/``, so that the way back needs nothing else. Training checkpoints are read
as well; their optimizer state is passed over.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_chord.convert.layout import Layout, Stored, layout_of, merged, without_padding
from megatron_chord.convert.stream import Box, Checkpoint, write
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.model.build import DTYPES
from megatron_chord.weights.mapping import check_accounting
from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.writer import copy_settings, finish_folder, write_shards

HF = "hf"
SHARD_BYTES = 10**9
"""Of an exported safetensors file: it is assembled in memory."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BESIDE_THE_MODEL = ("optimizer.", "rng", "rerun_state_machine_state")

Progress = Callable[[int], None]
"""Called with the number of bytes that have just been written."""


def hf_to_megatron(source: Path, target: Path, *, progress: Progress = lambda size: None) -> None:
    """A Hugging Face folder as a distributed checkpoint, in the dtype of its tensors.

    Peak memory beyond the program's own and the mapped pages of the source: the largest parameter, twice (its parts
    and their merged copy).

    Raises:
        ValueError: with all findings, one a line, before anything is written.
    """
    shape, reader = read_shape(source), HFReader.of(source)
    shape.weights.check_folder(reader.names, str(reader.folder))
    dtype = _only_dtype({name: reader.dtype(name) for name in shape.weights.hf_names()}, str(source))
    layout = layout_of(shape, _DTYPE_NAMES[dtype])
    _check_shapes(layout, shape, reader)
    parameter = functools.lru_cache(maxsize=1)(functools.partial(_parameter, reader=reader))

    def piece(stored: Stored, number: int) -> Tensor:
        box = stored.boxes[number]
        progress(box.num_bytes)
        return stored.piece(parameter(stored), number)

    boxes: dict[Box, Callable[[], Tensor]] = {
        box: functools.partial(piece, stored, number)
        for stored in layout.parameters
        for number, box in enumerate(stored.boxes)
    }
    with _appearing(target) as folder:
        write(folder, boxes, objects=dict(layout.objects))
        torch.save({}, folder / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common = {"common_backend": "torch", "common_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(backend | common))
        (folder / HF).mkdir()
        copy_settings(source, folder / HF)


def megatron_to_hf(
    source: Path, target: Path, *, hf: Path | None = None, progress: Progress = lambda size: None
) -> None:
    """A distributed checkpoint as a Hugging Face folder that Transformers and vLLM load as it is.

    Args:
        hf: folder with config.json and tokenizer files; ``source``/hf where left out.

    Peak memory beyond the program's own: the largest parameter, twice, and one safetensors shard, twice.

    Raises:
        ValueError: with all findings, one a line, before anything is written.
    """
    configuration = hf or source / HF
    shape, checkpoint = read_shape(configuration), Checkpoint(source)
    dtype, parameters = _check_checkpoint(checkpoint, shape)
    with _appearing(target) as folder:
        tensors = _hf_tensors(checkpoint, parameters, progress)
        placed = write_shards(tensors, folder, prefix="model", shard_bytes=SHARD_BYTES)
        check_accounting(list(shape.weights.hf_names()), list(placed), str(folder))
        finish_folder(folder, configuration, placed, dtype=dtype)


def plan_of(folder: Path) -> list[Stored]:
    """Every parameter that a folder's config.json asks for, without vocabulary padding; no weight is looked at."""
    shape = read_shape(folder)
    return [without_padding(stored, shape.vocab_size) for stored in layout_of(shape, "bf16").parameters]


def hf_tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a Hugging Face or Megatron folder by its Hugging Face name, one at a time."""
    if not is_megatron(folder):
        shape, reader = read_shape(folder), HFReader.of(folder)
        shape.weights.check_folder(reader.names, str(reader.folder))
        yield from ((name, reader.read(name)) for name in shape.weights.hf_names())
        return
    shape, checkpoint = read_shape(folder / HF), Checkpoint(folder)
    _, parameters = _check_checkpoint(checkpoint, shape)
    yield from _hf_tensors(checkpoint, parameters, lambda size: None)


def differences(left: Path, right: Path) -> Iterator[str]:
    """What keeps two folders, of either kind, from being the same model: a line a finding, none if they are."""
    ours, theirs = dict.fromkeys(_names(left)), dict.fromkeys(_names(right))
    yield from (f"{name} is in {left} only" for name in ours if name not in theirs)
    yield from (f"{name} is in {right} only" for name in theirs if name not in ours)
    if ours.keys() != theirs.keys():
        return
    # The two sides come in their own orders; what one is ahead of the other waits as a hash-sized digest.
    waiting: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
    for pair in zip(hf_tensors_of(left), hf_tensors_of(right), strict=True):
        for side, (name, tensor) in enumerate(pair):
            digest = _digest(tensor)
            other = waiting[1 - side].pop(name, None)
            if other is None:
                waiting[side][name] = digest
            elif other != digest:
                yield f"{name} differs"


def is_megatron(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


def _digest(tensor: Tensor) -> bytes:
    plain = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    header = f"{tuple(tensor.shape)}{tensor.dtype}".encode()
    return hashlib.blake2b(header + plain.numpy().tobytes(), digest_size=16).digest()


def _names(folder: Path) -> list[str]:
    shape = read_shape(folder / HF if is_megatron(folder) else folder)
    return list(shape.weights.hf_names())


def _hf_tensors(
    checkpoint: Checkpoint, parameters: Sequence[Stored], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    for stored in parameters:
        if not stored.entry.rule.exported:
            continue
        parameter = merged([checkpoint.read(box) for box in stored.boxes], stored)
        for name, tensor in zip(stored.entry.hf, stored.entry.rule.transform.split(parameter), strict=True):
            yield name, tensor.contiguous()
            progress(tensor.nbytes)


def _parameter(stored: Stored, *, reader: HFReader) -> Tensor:
    """The whole Megatron parameter; padding rows of the vocabulary are 0."""
    found = stored.entry.rule.transform.merge([reader.read(name) for name in stored.entry.hf])
    missing_rows = stored.shape[0] - found.shape[0]
    if missing_rows == 0:
        return found
    return torch.cat([found, found.new_zeros(missing_rows, *stored.shape[1:])])


def _check_shapes(layout: Layout, shape: ModelShape, reader: HFReader) -> None:
    findings = []
    for stored in layout.parameters:
        stored = without_padding(stored, shape.vocab_size)
        parts = [torch.empty(reader.shape(name), device="meta") for name in stored.entry.hf]
        sources = ", ".join(f"{name} {reader.shape(name)}" for name in stored.entry.hf)
        try:
            found = tuple(stored.entry.rule.transform.merge(parts).shape)
        except (RuntimeError, ValueError) as error:
            findings.append(f"{stored.entry.megatron} cannot be made of {sources}: {error}")
            continue
        if found != stored.shape:
            findings.append(f"{stored.entry.megatron} has shape {stored.shape}, but {sources} make {found}")
    if findings:
        raise ValueError(
            f"shapes in {reader.folder} disagree with its config.json:\n  " + "\n  ".join(findings)
        )


def _check_checkpoint(checkpoint: Checkpoint, shape: ModelShape) -> tuple[torch.dtype, list[Stored]]:
    """The checkpoint's dtype and its parameters without padding rows."""
    stored = {key: (whole, dtype) for key, whole, dtype in checkpoint.tensors()}
    model = {key: value for key, value in stored.items() if not key.startswith(_BESIDE_THE_MODEL)}
    layout = layout_of(shape, "fp32")
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
            f"{checkpoint.folder} does not hold this model's tensors:\n  " + "\n  ".join(sorted(findings))
        )
    dtype = _only_dtype({key: model[key][1] for key in wanted}, str(checkpoint.folder))
    return dtype, [without_padding(parameter, shape.vocab_size) for parameter in layout.parameters]


def _only_dtype(dtypes: dict[str, torch.dtype], where: str) -> torch.dtype:
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
    if len(kinds) > 1 or next(iter(dtypes.values())) not in _DTYPE_NAMES:
        raise ValueError(f"{where}: tensors must all be float32 or all bfloat16, they are {', '.join(kinds)}")
    return next(iter(dtypes.values()))


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes ``target`` when the block succeeds, and is gone when it does not."""
    if target.exists():
        raise ValueError(f"{target} is already there")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
