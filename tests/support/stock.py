"""Chat templates as published models have them, each with a tokenizer that has the template's markers as tokens.

The Jinja files are in the wheels of trl and axolotl, which `make test` unpacks beside the environment. The tokenizers
are made here: one token for each byte and one for each marker. So a text's tokens are those of its pieces.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(os.environ.get("MEGATRON_CHORD_TEMPLATES", Path(sys.prefix) / "templates"))

Pieces = Sequence[tuple[str, bool]]
"""A conversation that was written by hand. Each piece is a part of its text, and whether that part is trained."""

_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MARKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qwen": (("<|im_end|>", "<|endoftext|>", "<|im_start|>"), _THINK),
    "llama": (
        ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
        (),
    ),
    "deepseek": (
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "mistral": (("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ()),
}
"""For each family: its control tokens (end of turn and beginning of text first), and its markers that are text."""


def jinja(name: str) -> Path:
    """Return the file of ``trl/NAME`` or ``axolotl/NAME``."""
    package, stem = name.split("/")
    inside = {"trl": "trl/chat_templates", "axolotl": "axolotl/utils/chat_templates/templates"}[package]
    file = FOLDER / inside / f"{stem}.jinja"
    if not file.is_file():
        pytest.skip(f"there is no {file}, where `make test` puts it")
    return file


def save_tokenizer(folder: Path, family: str) -> Path:
    """Save a tokenizer with the markers of ``family``, without a template."""
    control, text = MARKS[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(control))
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in text])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=control[0], bos_token=control[1])
    fast.save_pretrained(folder)
    return folder
