"""Folders from which a model can be read: Hugging Face's safetensors, or a distributed checkpoint.

A source is checked when it is opened: names, shapes and dtypes of all tensors of the configuration, with all findings
in one error. After that, reading fails only if the disk fails.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_chord.config_io import ConfigError, load_config
from megatron_chord.convert.layout import CheckpointLayout, Stored, checkpoint_layout, without_padding
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.json_files import read_object
from megatron_chord.weights.findings import listing
from megatron_chord.weights.folder import check_copies, open_model
from megatron_chord.weights.reader import HFReader
from megatron_chord.weights.torch_dist import METADATA, Checkpoint
from megatron_chord.weights.transforms import merged_shape

HF = "hf"
_HELD_EXACTLY = {torch.float32: (torch.float32, torch.bfloat16, torch.float16)}
"""For a rule with a fixed dtype: the stored dtypes that it represents exactly."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MEGATRON_LATEST, _LATEST = "latest_checkpointed_iteration.txt", "latest"
_CHECKPOINT = re.compile(r"iter_\d{7,}|release|step-\d{6,}")
_CONFIG_NAMES = {"base": "rope_theta", "layernorm_epsilon": "rms_norm_eps", "tied": "tie_word_embeddings"}
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
    def layout(self) -> CheckpointLayout: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every tensor whose rule has no fixed dtype."""
        ...

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of Megatron's parameter, without padding rows. Both must be multiples of the transform's
        unit."""
        ...

    def tensors(self, stored: Stored) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors that the parameter is made of, by name."""
        ...


def open_source(
    folder: Path, configuration: Path | None = None, *, dtype: torch.dtype | None = None
) -> Source:
    """Open a folder of either kind, or a folder with a Megatron checkpoint one level below (see ``checkpoint_of``).

    Args:
        configuration: needed for a Megatron checkpoint without a configuration: it has neither ``hf/`` nor a run's
            config.yaml. It must not contradict the checkpoint's own configuration.
        dtype: every tensor is rounded to it when it is read. By default all tensors must have one dtype and keep it.

    Raises:
        ValueError: with all findings, one on each line.
    """
    folder = checkpoint_of(folder)
    if (folder / METADATA).is_file():
        described = _configuration(folder, configuration)
        _check_settings(described)
        return MegatronSource.of(folder, described, dtype)
    if configuration is not None:
        raise ValueError(
            f"{folder} is not a distributed checkpoint ({METADATA} is missing): it has its own config"
        )
    _check_settings(folder)
    return HFSource.of(folder, dtype)


def _check_settings(folder: Path) -> None:
    """Check the files that are copied. Raises ValueError for one that Transformers could not read."""
    for path in (folder / "generation_config.json", folder / "tokenizer_config.json"):
        if path.is_file():
            read_object(path)


def checkpoint_of(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest checkpoint in it by Megatron-LM's or our record file.

    Raises ValueError if the record names no existing checkpoint, or one in Megatron-LM's old format.
    """
    if (folder / METADATA).is_file() or not folder.is_dir():
        return folder
    for name, prefix in ((_MEGATRON_LATEST, "iter_"), (_LATEST, "")):
        record = folder / name
        if not record.is_file():
            continue
        named = record.read_text(errors="replace").strip()
        if prefix and named.isdecimal():
            named = f"{prefix}{int(named):07d}"
        if not _CHECKPOINT.fullmatch(named) or not (folder / named).is_dir():
            raise ValueError(f"{record} names the checkpoint {named[:80]!r}, which does not exist")
        folder = folder / named
    if next(folder.glob("mp_rank_*"), None) is not None:
        raise ValueError(
            f"{folder} is in Megatron-LM's old format (mp_rank_*): convert it with Megatron-LM's "
            "--ckpt-convert-format torch_dist"
        )
    return folder


def _configuration(checkpoint: Path, given: Path | None) -> Path:
    """The Hugging Face folder that describes the checkpoint: its own, or the given one if they agree."""
    own = checkpoint / HF
    if not own.is_dir():
        own = _model_of_run(checkpoint)
    if given is None:
        if own is None:
            raise ValueError(
                f"{checkpoint} has no {HF}/ with a config.json: name its model's folder with --hf"
            )
        return own
    if own is not None and (own / "config.json").is_file():
        findings = [
            f"{name}: {ours} in {own}, {theirs} in {given}"
            for name, ours, theirs in _contradictions(read_shape(own), read_shape(given))
        ]
        if findings:
            raise ValueError(listing(f"--hf {given} contradicts the checkpoint's own {own}:", findings))
    return given


def _model_of_run(checkpoint: Path) -> Path | None:
    """The model folder of a run, if the checkpoint lies in the run's folder."""
    config = checkpoint.parent.parent / "config.yaml"
    if checkpoint.parent.name != "checkpoints" or not config.is_file():
        return None
    try:
        return load_config(config).model.path
    except ConfigError as error:
        raise ValueError(f"{config} does not say which model this is: {error}") from error


def _contradictions(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, value) for each difference between two models' shapes."""
    if one == other or name == "weights":
        return
    if is_dataclass(one) and type(one) is type(other):
        one, other = vars(one), vars(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from _contradictions(one.get(key), other.get(key), key)
        return
    yield _CONFIG_NAMES.get(name, name), one, other


@dataclass(frozen=True, kw_only=True)
class HFSource:
    folder: Path
    shape: ModelShape
    layout: CheckpointLayout
    dtype: torch.dtype
    reader: HFReader

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype | None = None) -> HFSource:
        shape = read_shape(folder)
        reader = open_model(folder, shape.weights)
        check_copies(reader, shape.weights)
        dtypes, own = {name: reader.dtype(name) for name in shape.weights.hf_names()}, shape.weights.dtypes()
        dtype = _one_dtype({name: found for name, found in dtypes.items() if name not in own}, folder, dtype)
        findings = [
            f"{name} is of type {dtypes[name]}, which {wanted} cannot represent exactly"
            for name, wanted in own.items()
            if dtypes[name] not in _HELD_EXACTLY[wanted]
        ]
        if findings:
            raise ValueError(listing(f"{folder}:", findings))
        layout = checkpoint_layout(shape)
        _check_shapes(layout, shape, reader)
        return cls(folder=folder, shape=shape, layout=layout, dtype=dtype, reader=reader)

    @property
    def configuration(self) -> Path:
        return self.folder

    @property
    def left_out(self) -> list[str]:
        """Tensors of the folder that do not belong to the model."""
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
    """A checkpoint of any layout. The optimizer state of a training checkpoint is ignored."""

    folder: Path
    configuration: Path
    shape: ModelShape
    layout: CheckpointLayout
    dtype: torch.dtype
    checkpoint: Checkpoint

    @classmethod
    def of(cls, folder: Path, configuration: Path, dtype: torch.dtype | None = None) -> MegatronSource:
        shape, checkpoint = read_shape(configuration), Checkpoint(folder)
        layout = checkpoint_layout(shape)
        dtype = _check_checkpoint(checkpoint, layout, shape, dtype)
        return cls(
            folder=folder,
            configuration=configuration,
            shape=shape,
            layout=layout,
            dtype=dtype,
            checkpoint=checkpoint,
        )

    def rows(self, stored: Stored, start: int, stop: int) -> Tensor:
        """Additional memory: one stored piece of the checkpoint."""
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


def _check_shapes(layout: CheckpointLayout, shape: ModelShape, reader: HFReader) -> None:
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


def _check_checkpoint(
    checkpoint: Checkpoint, layout: CheckpointLayout, shape: ModelShape, dtype: torch.dtype | None
) -> torch.dtype:
    """Check that the checkpoint has exactly the layout's tensors. Returns its dtype, or ``dtype`` if given."""
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
            listing(f"{checkpoint.folder} does not have this model's tensors:", sorted(findings))
        )
    own = {box.key for p in layout.parameters if p.entry.rule.dtype is not None for box in p.boxes}
    return _one_dtype({key: model[key][1] for key in wanted if key not in own}, checkpoint.folder, dtype)


def _one_dtype(dtypes: Mapping[str, torch.dtype], folder: Path, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that all tensors have. If ``wanted`` is given, they may differ, and it is returned."""
    found = statistics.mode(dtypes.values())
    can_round = all(dtype in (*_DTYPES, torch.float64) for dtype in dtypes.values())
    if wanted is not None and can_round:
        return wanted
    others = [f"{name} is {_named(dtype)}" for name, dtype in sorted(dtypes.items()) if dtype != found]
    if wanted is None and not others and found in _DTYPES:
        return found
    must = f"{folder}: tensors must all be float32, all bfloat16 or all float16"
    hint = " (--dtype rounds them to one)" if can_round else ""
    if not others:
        raise ValueError(f"{must}{hint}, they are all {_named(found)}")
    raise ValueError(listing(f"{must}{hint}. {len(dtypes) - len(others)} are {_named(found)}, but:", others))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
