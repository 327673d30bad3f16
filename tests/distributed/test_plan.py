"""The planner's memory is that of real ranks: weights, gradients, optimizer state and kept activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.plan.memory import Numerics, Training, layer_activations, stage_memory
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.state import build_state
from tests.distributed.steps import build
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model


def static_bytes(folder: Path, parallel: ParallelConfig) -> dict[str, int]:
    """Count the bytes of this rank's weights, gradients and optimizer state, as the trainer builds them in BF16, after
    one step."""
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
    """Two data-parallel ranks train in BF16. Megatron pads its buffers by some bytes."""
    folder = save_model(family, tmp_path, layers=2)
    parallel = ParallelConfig(ranks=2, distributed_optimizer=sharded)
    training = Training(parallel=parallel, data=2, micro_tokens=512, micro_batches=1, recompute="none")
    expected = stage_memory(read_shape(folder), training, 0)
    ranks = run_ranks(static_bytes, 2, folder, parallel)
    for name in ("weights", "gradients"):
        assert [found[name] for found in ranks] == pytest.approx([getattr(expected, name)] * 2, rel=0.01)
    # A shard ends where a buffer ends, not where a parameter ends, so the ranks differ a little.
    mean = sum(found["optimizer"] for found in ranks) / 2
    assert mean == pytest.approx(expected.optimizer, rel=0.01)


TOKENS, LAYERS = 64, 3


def kept_bytes(folder: Path) -> dict[str, int]:
    """Count the bytes that a forward pass of TOKENS tokens keeps for the backward pass, by model.recompute, without
    weights."""
    from megatron.core.packed_seq_params import PackedSeqParams

    kept = {}
    ids, starts = torch.arange(TOKENS)[None], torch.tensor([0, TOKENS], dtype=torch.int32)
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    packing: dict[str, Any] = dict.fromkeys(names, starts)
    for recompute in ("none", "mlp", "full"):
        state = build(folder, ParallelConfig(distributed_optimizer=False), recompute=recompute)
        weights = {parameter.untyped_storage().data_ptr() for parameter in state.parameters().values()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(
            tensor: torch.Tensor, weights: set[int] = weights, storages: dict[int, Any] = storages
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            params = PackedSeqParams(qkv_format="thd", max_seqlen_q=TOKENS, max_seqlen_kv=TOKENS, **packing)
            (chunk,) = state.chunks
            hidden = chunk(ids, ids, None, packed_seq_params=params)
        kept[recompute] = sum(storage.nbytes() for storage in storages.values())
        del hidden
    return kept


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_recomputing_keeps_less(family: str, tmp_path: Path) -> None:
    """Recomputing saves at least what the planner counts. (Megatron's local layers keep more than it counts.)"""
    folder = save_model(family, tmp_path, layers=LAYERS)
    shape = read_shape(folder)
    (kept,) = run_ranks(kept_bytes, 1, folder)

    def counted(recompute: str) -> float:
        training = Training(
            parallel=ParallelConfig(),
            data=1,
            micro_tokens=TOKENS,
            micro_batches=1,
            recompute=recompute,
            numerics=Numerics.of("fp32"),
        )
        return TOKENS * sum(layer_activations(shape, training, number).kept for number in range(LAYERS))

    assert kept["none"] - kept["mlp"] >= counted("none") - counted("mlp") > 0
    assert kept["mlp"] - kept["full"] >= counted("mlp") - counted("full") > 0
    final_norm = 2 * TOKENS * shape.hidden_size * 4  # the norm's input and its normalised input
    assert kept["full"] == pytest.approx(counted("full") + final_norm, rel=0.15)  # and rotary angles
