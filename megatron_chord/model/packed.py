"""The description of packed sequences that the model gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's parameters, with one more that Transformer Engine's attention takes.

    Without it, and with padded lengths, each attention layer compares the two kinds of lengths, and the host waits for
    the device (Transformer Engine 2.11, dot_product_attention.py:1299). Context parallelism needs the padded lengths.
    """

    pad_between_seqs: bool | None = False
    """Our padding is a sequence of its own, or a part of one: ``cu_seqlens_q`` and ``cu_seqlens_q_padded`` are
    equal. Megatron-Core 0.19.2 has this field, too."""


@dataclass
class SharedPrompts(PackedSequences):
    """A pack in which sequences share a prompt (``data.shared_prompts``)."""

    prompts: tuple[int, ...] = ()
    """Index of the sequence that comes before each sequence as its prompt; -1: none."""


def pass_on_padding(chunk: Any) -> None:
    """Let Megatron-Core 0.16.1's attention pass ``pad_between_seqs`` on to Transformer Engine; 0.19.2's does so.

    All packs of the chunk must then be ``PackedSequences``.
    """
    for module in chunk.modules():
        if hasattr(module, "kept_packed_seq_params"):
            module.kept_packed_seq_params.add("pad_between_seqs")
