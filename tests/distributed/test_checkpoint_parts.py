"""The parts that all ranks write of a checkpoint contain each element once. One process acts as each rank in turn."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist

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


def boxes_of(
    folder: Path, parallel: ParallelConfig, dtype: Dtype, *, rank: int, world_size: int
) -> list[Box]:
    """What a rank writes after one step, which gives Adam its moments."""
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
        boxes, _, _ = checkpoint._described(state)[""]
        return list(boxes)


def boxes_of_all_ranks(folders: dict[str, Path]) -> dict[str, list[list[Box]]]:
    torch.set_num_threads(1)
    return {
        name: [
            boxes_of(folders[family], ParallelConfig(**axes), dtype, rank=rank, world_size=world)
            for rank in range(world)
        ]
        for name, (family, dtype, world, axes) in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Box]]]:
    folders = {
        family: save_model(family, tmp_path_factory.mktemp(family), layers=2)
        for family in ("qwen2", "qwen3_moe")
    }
    return run_ranks(boxes_of_all_ranks, 1, folders)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_write_each_element_once(written: dict[str, list[list[Box]]], layout: str) -> None:
    by_key: dict[str, list[Box]] = defaultdict(list)
    for box in (box for boxes in written[layout] for box in boxes):
        by_key[box.key].append(box)
    assert len(by_key) > 20
    for key, boxes in by_key.items():
        assert is_tiling(boxes[0].whole, [(box.offset, box.shape) for box in boxes]), key


@pytest.mark.parametrize("layout", ["dp2", "cp2_dp2", "dp2_replicated_optimizer", "experts_ep2_dp4"])
def test_ranks_with_the_same_weights_write_equally_many_bytes_of_them(
    written: dict[str, list[list[Box]]], layout: str
) -> None:
    sizes = [
        sum(box.num_bytes for box in boxes if not box.key.startswith("optimizer."))
        for boxes in written[layout]
    ]
    assert min(sizes) > 0.6 * max(sizes), sizes
