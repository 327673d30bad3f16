"""The imbalance of work between pipeline stages, and the stage lengths that minimise it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.flops import head_flops, layer_flops
from megatron_chord.costs.stages import stage_layers
from megatron_chord.families.shape import ModelShape


def slowdown(shape: ModelShape, parallel: ParallelConfig, *, length: float, recompute: str) -> float:
    """Work of the largest stage, divided by that of the largest stage if all stages had equally many layers.

    It is 1 without ``parallel.stages``. It is below 1 if a shorter last stage compensates for the head. All stages wait
    for the largest one in every micro-batch.

    Args:
        length: mean length of the sequences in tokens, as defined in ``costs.flops``.
        recompute: the value of ``model.recompute``.
    """
    if parallel.stages is None:
        return 1.0
    layers, head = _costs(shape, length, recompute)
    work = [
        sum(layers[number] for number in stage_layers(shape.num_layers, parallel, stage))
        for stage in range(parallel.pipeline)
    ]
    work[-1] += head
    return max(work) / (sum(layers) / parallel.pipeline + head)


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
    layers, head = _costs(shape, length, recompute)
    of_head = head / (sum(layers) / len(layers))
    lengths = [chunks] * pipeline
    for _ in range(shape.num_layers - pipeline * chunks):
        work = [own + (of_head if stage == pipeline - 1 else 0.0) for stage, own in enumerate(lengths)]
        lengths[min(range(pipeline), key=lambda stage: (work[stage], -stage))] += 1
    return tuple(_share(own, chunks, chunk) for chunk in range(chunks) for own in lengths)


def _share(layers: int, chunks: int, chunk: int) -> int:
    """The number of a stage's layers in one of its chunks. The first chunks get the remainder."""
    return layers // chunks + (chunk < layers % chunks)


def _costs(shape: ModelShape, length: float, recompute: str) -> tuple[Sequence[float], float]:
    """FLOPs of a token's passes through each layer, and through the head, whose chunks are always computed twice."""
    return layer_flops(shape, length, recompute), 4 / 3 * head_flops(shape)
