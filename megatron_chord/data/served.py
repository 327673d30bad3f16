"""Checks that AutoTokenizer, which most programs use, tokenises the exported folder like the training.

Training reads the folder's own tokenizer file. AutoTokenizer chooses the tokenizer by ``tokenizer_class`` and, for
some model types, by the model type alone. vLLM loads tokenizers with it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_chord.data.templates import ChatTemplate

_PROBES = (
    "What is 12 + 7?",
    "two  spaces,\na line\n\n\tand a tab. #### 1234",
    "Don't l'été Москва 漢字 🦆",
)


def tokenizer_difference(folder: Path, template: ChatTemplate, rows: Iterable[Sequence[int]]) -> str | None:
    """The first text that AutoTokenizer encodes or decodes differently from ``template``; None if there is none.

    ``rows``: token ids of prompts and demonstrations to try in addition to some fixed texts.
    """
    from transformers import AutoTokenizer

    try:
        auto: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"AutoTokenizer, which vLLM uses, too, cannot load {folder}: {error}"
    what = f"AutoTokenizer ({type(auto).__name__}), which vLLM uses, too,"
    ours: Any = template.tokenizer
    decoded = (
        ours.decode(list(row), skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows
    )
    for text in (*_PROBES, *decoded):
        expected = ours(text, add_special_tokens=False).input_ids
        found = auto(text, add_special_tokens=False).input_ids
        if found != expected:
            place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
            return (
                f"{what} reads {_shown(text)} as {found[place : place + 4]} from token {place} on, training as "
                f"{expected[place : place + 4]}"
            )
        written, read_back = auto.decode(found, skip_special_tokens=True), template.decode(expected)
        if written != read_back:
            return f"{what} writes {found[:8]} as {_shown(written)}, training as {_shown(read_back)}"
    if auto.eos_token_id != ours.eos_token_id:
        return f"{what} ends at {auto.eos_token!r}, training at {ours.eos_token!r}"
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
