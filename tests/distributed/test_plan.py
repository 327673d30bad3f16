"""The planner's static memory against real ranks: weights, gradients and optimizer state as the trainer builds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.plan.memory import Training, stage_memory
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.state import build_state
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model


def static_bytes(folder: Path, parallel: ParallelConfig) -> dict[str, int]:
    """Of this rank's weights, gradients and optimizer state, as the trainer builds them in BF16; one Adam step done."""
    state = build_state(
        read_shape(folder),
        ModelConfig(path=folder, dtype="bf16"),
        parallel,
        OptimConfig(),
        groups=runtime.start(parallel, seed=0),
        steps=10,
    )
    buffers = [
        buffer for chunk in state.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    for buffer in buffers:
        buffer.grad_data.fill_(1e-3)
    state.optimizer.step()
    moments = {}
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                for tensor in (parameter, *inner.state[parameter].values()):
                    if isinstance(tensor, torch.Tensor):
                        moments[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return {
        "weights": sum(parameter.nbytes for parameter in state.parameters().values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(moments.values()),
    }


@pytest.mark.parametrize(
    ("family", "sharded"), [("qwen2", True), ("qwen2", False), ("qwen3_moe", True), ("deepseek_v3", True)]
)
def test_static_bytes_are_the_trainers(family: str, sharded: bool, tmp_path: Path) -> None:
    """Two data-parallel ranks in BF16; Megatron's buffers are padded by some bytes."""
    folder = save_model(family, tmp_path, layers=2)
    parallel = ParallelConfig(ranks=2, distributed_optimizer=sharded)
    training = Training(parallel=parallel, data=2, micro_tokens=512, micro_batches=1, recompute="none")
    expected = stage_memory(read_shape(folder), training, 0)
    ranks = run_ranks(static_bytes, 2, folder, parallel)
    for name in ("weights", "gradients"):
        assert [found[name] for found in ranks] == pytest.approx([getattr(expected, name)] * 2, rel=0.01)
    # A shard ends where a buffer does, not where a parameter does: ranks differ a little.
    mean = sum(found["optimizer"] for found in ranks) / 2
    assert mean == pytest.approx(expected.optimizer, rel=0.01)
