"""What the model is told of a pack in which sequences share a prompt (``data.shared_prompts``)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SharedPrompts(PackedSeqParams):
    prompts: tuple[int, ...] = ()
    """By sequence: the index of the sequence that comes before it as its prompt; -1: none."""
