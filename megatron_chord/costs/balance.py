"""The imbalance of work between pipeline stages, and the stage lengths that minimise it."""

from __future__ import annotations

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.flops import head_flops, layer_flops
from megatron_chord.costs.stages import stage_layers
from megatron_chord.families.shape import ModelShape

HEAD_PASSES = 4 / 3
"""FLOPs of the head over those of a forward and a backward pass: its chunks are computed twice
(``losses/logprobs.py``)."""


def slowdown(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    length: float,
    recompute: str,
    head_passes: float = HEAD_PASSES,
) -> float:
    """Work of the largest stage, divided by the mean of all stages. All stages wait for the largest one in every
    micro-batch. It is 1 without a pipeline.

    Args:
        length: mean length of the sequences in tokens, as defined in ``costs.flops``.
        recompute: the value of ``model.recompute``.
        head_passes: 1 for a trainer that computes all logits once.
    """
    layers, head = layer_flops(shape, length, recompute), head_passes * head_flops(shape)
    work = [
        sum(layers[number] for number in stage_layers(shape.num_layers, parallel, stage))
        for stage in range(parallel.pipeline)
    ]
    work[-1] += head
    return max(work) / (sum(work) / parallel.pipeline)


def balanced_stages(
    shape: ModelShape, *, pipeline: int, chunks: int = 1, length: float, recompute: str
) -> tuple[int, ...]:
    """The ``parallel.stages`` that minimise the work of the largest stage.

    The cost of the head is added to the last stage. All layers count with their mean cost. If several choices are
    equal, later stages get more layers, because earlier stages keep the activations of more micro-batches.

    Raises:
        ValueError: there are fewer layers than chunks.
    """
    if shape.num_layers < pipeline * chunks:
        raise ValueError(f"{shape.num_layers} layers cannot fill {pipeline} stages of {chunks} chunks")
    layers, head = layer_flops(shape, length, recompute), HEAD_PASSES * head_flops(shape)
    of_head = head / (sum(layers) / len(layers))
    lengths = [chunks] * pipeline
    for _ in range(shape.num_layers - pipeline * chunks):
        work = [own + (of_head if stage == pipeline - 1 else 0.0) for stage, own in enumerate(lengths)]
        lengths[min(range(pipeline), key=lambda stage: (work[stage], -stage))] += 1
    return tuple(_share(own, chunks, chunk) for chunk in range(chunks) for own in lengths)


def _share(layers: int, chunks: int, chunk: int) -> int:
    """The number of a stage's layers in one of its chunks. The first chunks get the remainder."""
    return layers // chunks + (chunk < layers % chunks)
