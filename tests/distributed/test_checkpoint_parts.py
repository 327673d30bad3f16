"""The parts that all ranks write of a checkpoint contain each element once, and need no memory on the ranks' devices.

One process acts as each rank in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.train import checkpoint
from megatron_chord.train.state import build_state, parts_of
from megatron_chord.weights.torch_dist import Box, is_tiling
from tests.support.fake_world import rank_of
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model

Dtype = Literal["fp32", "bf16"]
LAYOUTS: dict[str, tuple[str, Dtype, int, dict[str, Any]]] = {
    "dp2": ("qwen2", "fp32", 2, {}),
    "tp2_dp2": ("qwen2", "bf16", 4, {"tensor": 2}),
    "pp2_dp2": ("qwen2", "fp32", 4, {"pipeline": 2}),
    "cp2_dp2": ("qwen2", "bf16", 4, {"context": 2}),
    "dp2_replicated_optimizer": ("qwen2", "bf16", 2, {"distributed_optimizer": False}),
    "experts_ep2_dp4": ("qwen3_moe", "bf16", 4, {"expert": 2}),
    "experts_tp2_ep1_dp2": ("qwen3_moe", "fp32", 4, {"tensor": 2, "sequence_parallel": True}),
    "experts_tp2_ep2_pp2_dp2": (
        "qwen3_moe",
        "bf16",
        8,
        {"tensor": 2, "sequence_parallel": True, "expert": 2, "pipeline": 2},
    ),
}


@dataclass(frozen=True)
class Described:
    """What a rank writes after one step, which gives Adam its moments."""

    boxes: list[Box]
    parameters: int
    """Number of elements of this rank's weights."""
    allocated: int
    """Bytes that the description allocated; Megatron-Core's own: ``gathered``."""
    gathered: int
    copied: list[str]
    """Keys of boxes whose data is no contiguous part of memory that existed before the description. To copy such data
    to main memory, torch first copies it on its device."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within the context, except on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta and _storage(tensor) not in before:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _makes_a_copy(data: Callable[[], Tensor]) -> bool:
    with Allocations() as made:
        is_contiguous = data().is_contiguous()
    return made.num_bytes > 0 or not is_contiguous


def described(
    folder: Path, parallel: ParallelConfig, dtype: Dtype, *, rank: int, world_size: int
) -> Described:
    from megatron.core import parallel_state

    def axis(group: Any) -> SimpleNamespace:
        return SimpleNamespace(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)

    with (
        rank_of(parallel, rank=rank, world_size=world_size),
        # torch's fake process group has no gloo groups, and nothing is sent here.
        mock.patch.object(
            parallel_state, "get_data_parallel_group_gloo", parallel_state.get_data_parallel_group
        ),
        mock.patch.object(
            parallel_state,
            "get_expert_data_parallel_group_gloo",
            parallel_state.get_expert_data_parallel_group,
        ),
    ):
        groups: Any = SimpleNamespace(
            rank=rank,
            world_size=world_size,
            replicas=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            expert_replicas=axis(parallel_state.get_expert_data_parallel_group()),
        )
        state = build_state(
            read_shape(folder),
            ModelConfig(path=folder, dtype=dtype),
            parallel,
            OptimConfig(),
            groups=groups,
            steps=1,
            fill=lambda weights: [weight.data.fill_(0.5) for weight in weights.values()],
        )
        for chunk in state.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                buffer.grad_data.fill_(1e-3)
        for part in parts_of(state.optimizer):
            part.prepare_grads()
            part.optimizer.step()
        with Allocations() as ours:
            boxes, _, _ = checkpoint._described(state)[""]
        with Allocations() as megatrons:
            checkpoint._sharded(state, is_loading=False)
        return Described(
            boxes=list(boxes),
            parameters=sum(weight.numel() for chunk in state.chunks for weight in chunk.parameters()),
            allocated=ours.num_bytes,
            gathered=megatrons.num_bytes,
            copied=[box.key for box, data in boxes.items() if _makes_a_copy(data)],
        )


def all_ranks(folders: dict[str, Path]) -> dict[str, list[Described]]:
    torch.set_num_threads(1)
    return {
        name: [
            described(folders[family], ParallelConfig(**axes), dtype, rank=rank, world_size=world)
            for rank in range(world)
        ]
        for name, (family, dtype, world, axes) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Described]]:
    folders = {
        family: save_model(family, tmp_path_factory.mktemp(family), layers=2)
        for family in ("qwen2", "qwen3_moe")
    }
    return run_ranks(all_ranks, 1, folders)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_write_each_element_once(written: dict[str, list[Described]], layout: str) -> None:
    by_key: dict[str, list[Box]] = defaultdict(list)
    for box in (box for rank in written[layout] for box in rank.boxes):
        by_key[box.key].append(box)
    assert len(by_key) > 20
    for key, boxes in by_key.items():
        assert is_tiling(boxes[0].whole, [(box.offset, box.shape) for box in boxes]), key


@pytest.mark.parametrize("layout", ["dp2", "cp2_dp2", "dp2_replicated_optimizer", "experts_ep2_dp4"])
def test_ranks_with_the_same_weights_write_equally_many_bytes_of_them(
    written: dict[str, list[Described]], layout: str
) -> None:
    sizes = [
        sum(box.num_bytes for box in rank.boxes if not box.key.startswith("optimizer."))
        for rank in written[layout]
    ]
    assert min(sizes) > 0.6 * max(sizes), sizes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_allocates_nothing_on_the_devices_of_any_stage(
    written: dict[str, list[Described]], layout: str
) -> None:
    """The description allocates nothing, and what is written are contiguous parts of the ranks' own memory, which torch
    copies to main memory without a copy on the device. In comparison: Megatron-Core gathers main weights and two
    moments, more than 12 bytes a parameter with a distributed optimizer."""
    for rank in written[layout]:
        assert (rank.allocated, rank.copied) == (0, [])
        if layout != "dp2_replicated_optimizer":
            assert rank.gathered > 12 * rank.parameters
