"""What single ranks of a large run hold, as Megatron builds them. The functions run in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_chord.config import ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.model.build import global_parameters
from tests.support.fake_world import chunks_on_meta, rank_of


@dataclass(frozen=True)
class Held:
    """What one rank holds."""

    stage: int
    tensor: int
    expert: int
    replicas: int
    """The number of ranks that hold the same weights, without experts. ``expert_replicas`` is the number for
    experts."""
    expert_replicas: int
    shapes: dict[str, tuple[int, ...]]
    """The shape of each parameter, by global name."""


@dataclass(frozen=True)
class Asked:
    """The ranks of one layout of one model."""

    folder: Path
    parallel: ParallelConfig
    ranks: tuple[int, ...]
    world_size: int


def held(*asked: Asked) -> list[list[Held]]:
    """Return what each of the ranks holds, for each of the layouts."""
    return [[_held(read_shape(one.folder), one, rank) for rank in one.ranks] for one in asked]


def _held(shape: ModelShape, asked: Asked, rank: int) -> Held:
    from megatron.core import parallel_state

    with rank_of(asked.parallel, rank=rank, world_size=asked.world_size):
        parameters = global_parameters(chunks_on_meta(shape, asked.parallel))
        assert all(one.device.type == "meta" for one in parameters.values() if one.dim() > 1)
        return Held(
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tensor=parallel_state.get_tensor_model_parallel_rank(),
            expert=parallel_state.get_expert_model_parallel_rank(),
            replicas=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            expert_replicas=parallel_state.get_expert_data_parallel_world_size(),
            shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        )


def warm_ups(*asked: tuple[ParallelConfig, int]) -> list[list[int]]:
    """Return the number of forward passes before the first backward pass, for each layout and stage.

    Each layout comes with its number of micro-batches. Megatron's schedule counts the passes; a pass is one of one
    chunk.
    """
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    found = []
    for parallel, micro_batches in asked:
        found.append([])
        for stage in range(parallel.pipeline):
            with rank_of(parallel, rank=stage, world_size=parallel.pipeline):
                chunks = parallel.virtual_pipeline or 1
                found[-1].append(get_pp_rank_microbatches(micro_batches, chunks, parallel.pipeline)[2])
    return found


def conversion_plans(*folders: Path) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the whole model's parameters, without padding, as ``tools/convert.py plan`` lists them."""
    from megatron_chord.convert.directions import plan_of

    return [{stored.entry.megatron: stored.shape for stored in plan_of(folder)} for folder in folders]
