"""Advice for a folder that is not a plain model, found by its files and by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_SAVE_AGAIN = "load it with Transformers and save it again with save_pretrained, which writes safetensors"
_BY_FILE = (
    ("adapter_config.json", "it holds an adapter (PEFT): merge it into its base model with merge_and_unload"),
    ("pytorch_model*.bin*", f"it holds pickled weights, which are not read: {_SAVE_AGAIN}"),
    ("*.gguf", f"it holds GGUF weights: {_SAVE_AGAIN}"),
    ("consolidated.*", f"it holds the publisher's own format: {_SAVE_AGAIN}"),
    ("snapshots", "it is an entry of the hub's cache: give the folder snapshots/REVISION in it"),
)
_BY_NAME = (
    (r"(^|\.)lora_[AB]\.", "these are an adapter's (LoRA): merge it into its base model with merge_and_unload"),
    (r"^v_head\.", "this is a model with a value head (TRL): save only its `pretrained_model`"),
    (r"^score\.", "this is a classifier or reward model, which has no head for tokens: give the policy instead"),
    (r"^_orig_mod\.", "the names are those of torch.compile's wrapper: save the model inside it (`_orig_mod`)"),
    (r"^module\.", "the names are those of a data-parallel wrapper: save the model inside it (`module`)"),
    (r"^base_model\.", "the names are those of PEFT's wrapper: merge the adapter with merge_and_unload and save that"),
    (r"(^|\.)(vision_tower|visual|language_model)\.", "this is a model for images and text: give its text model"),
    (r"\.(qweight|qzeros|weight_scale|weight_scale_inv|absmax)$", "the weights are quantised: give the model in BF16"),
)  # fmt: skip


def of_folder(folder: Path) -> str | None:
    """What a folder without safetensors contains instead, and what the user should do. None if nothing is known."""
    return next((text for pattern, text in _BY_FILE if next(folder.glob(pattern), None) is not None), None)


def of_names(unexpected: Iterable[str]) -> str | None:
    """The kind of folder that the names of unexpected tensors show, with advice. None if nothing is known."""
    names = list(unexpected)
    return next((text for pattern, text in _BY_NAME if any(re.search(pattern, name) for name in names)), None)


def of_file(path: Path) -> str | None:
    """The reason why a file is not a valid safetensors file, or None."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(_LFS):
        return "it is a pointer of Git LFS: fetch the file itself with `git lfs pull`"
    return "it is empty" if not start else None
