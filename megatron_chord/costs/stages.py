"""The layers of each pipeline stage: equally many, or as given by ``parallel.stages``."""

from __future__ import annotations

from itertools import accumulate

from megatron_chord.config import ParallelConfig


def chunk_lengths(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Layers of every model chunk in the model's order; chunk n belongs to stage n modulo ``parallel.pipeline``."""
    if parallel.stages is not None:
        return parallel.stages
    return (num_layers // parallel.num_chunks,) * parallel.num_chunks


def stage_chunks(num_layers: int, parallel: ParallelConfig, stage: int) -> list[range]:
    """Numbers of the layers in each chunk of a pipeline stage. Virtual stages are assigned round-robin.

    Megatron-Core 0.16.1, transformer/transformer_layer.py, get_transformer_layer_offset.
    """
    lengths = chunk_lengths(num_layers, parallel)
    ends = list(accumulate(lengths))
    return [
        range(ends[chunk] - lengths[chunk], ends[chunk])
        for chunk in range(stage, parallel.num_chunks, parallel.pipeline)
    ]


def stage_layers(num_layers: int, parallel: ParallelConfig, stage: int) -> list[int]:
    """Numbers of all layers of a pipeline stage."""
    return [number for chunk in stage_chunks(num_layers, parallel, stage) for number in chunk]
