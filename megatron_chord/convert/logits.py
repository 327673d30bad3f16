"""One forward pass of a model in fp32: with Transformers for Hugging Face folders, with Megatron-Core for its own."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.convert.layout import PIECE_BYTES, without_padding
from megatron_chord.convert.sources import HFSource, Source
from megatron_chord.model.build import build_chunks, global_weights, transformer_config
from megatron_chord.runtime import parallel as runtime

TOLERANCE = 1e-4
"""Limit of largest difference / max(1, largest absolute value)."""


def sample_tokens(vocab_size: int, length: int = 128) -> Tensor:
    """Arbitrary tokens, the same for both models: [length] int64."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def logits_of(source: Source, tokens: Tensor) -> Tensor:
    """The logits [tokens, vocabulary] in fp32. Needs memory for the whole model in fp32."""
    return _transformers(source, tokens) if isinstance(source, HFSource) else _megatron(source, tokens)


def logit_differences(left: Tensor, right: Tensor) -> tuple[float, float]:
    """(largest difference, share of positions at which both have the same most likely token)."""
    return (left - right).abs().max().item(), (left.argmax(-1) == right.argmax(-1)).float().mean().item()


def _transformers(source: Source, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return model(tokens[None]).logits[0].float()


def _megatron(source: Source, tokens: Tensor) -> Tensor:
    from megatron_chord.model.packed import PackedSequences

    alone = ParallelConfig()
    groups = runtime.start(alone, seed=0)
    model = ModelConfig(path=source.configuration, dtype="fp32")
    (chunk,) = build_chunks(transformer_config(source.shape, model, alone), source.shape)
    weights = global_weights([chunk])
    with torch.no_grad():
        for stored in source.layout.parameters:
            unpadded = without_padding(stored, source.shape.vocab_size)
            into = weights[stored.entry.megatron]
            for piece in unpadded.pieces(PIECE_BYTES):
                into[piece.start : piece.stop].copy_(source.rows(unpadded, piece.start, piece.stop))
        tokens = tokens.to(groups.device)
        starts = torch.tensor([0, len(tokens)], dtype=torch.int32, device=groups.device)
        packed = PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=len(tokens),
            max_seqlen_kv=len(tokens),
        )
        positions = torch.arange(len(tokens), device=groups.device)
        hidden = chunk(tokens[None], positions[None], None, packed_seq_params=packed)
        head = chunk.output_weight()[: source.shape.vocab_size]
        return (hidden[:, 0] @ head.t()).float().cpu()
