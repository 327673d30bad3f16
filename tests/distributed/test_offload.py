"""Training state that was moved to host memory between updates stays the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.train import offload
from megatron_chord.train.offload import Offload
from megatron_chord.train.state import NonFiniteGradient, TrainState, build_state
from megatron_chord.train.update import apply_gradients
from tests.distributed.steps import gather_hf, start_groups
from tests.distributed.watched import PRESETS, preset, watched_step
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model, save_qwen2

STEPS = 3
PIECE = 10_000
"""Bytes. It is so small that storages cross the borders of pieces."""


def fresh(folder: Path, parallel: ParallelConfig, dtype: str, reference: Path | None = None) -> TrainState:
    return build_state(
        read_shape(folder),
        ModelConfig(path=folder, dtype=dtype),  # type: ignore[arg-type]
        parallel,
        OptimConfig(lr=1e-2),
        groups=start_groups(parallel),
        steps=STEPS,
        reference=reference,
    )


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of the weights, and of what the optimizer and the reference hold."""
    held = {str(i): tensor for i, tensor in enumerate(map(as_tensor, offload.storages(state)))}
    return {name: tensor.clone() for name, tensor in (state.weights() | held).items()}


def as_tensor(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def views(state: TrainState) -> list[tuple[int, int, torch.Size]]:
    """For each weight and gradient: its storage, and the tensor's offset and shape in it."""
    tensors = [t for p in state.parameters().values() for t in (p, p.main_grad)]  # type: ignore[attr-defined]
    return [(t.untyped_storage()._cdata, t.storage_offset(), t.shape) for t in tensors]


def with_and_without(folder: Path, axes: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Train three steps of DPO, which reads a reference: once straight, and once with the state moved away between
    steps."""
    offload._PIECE = PIECE
    parallel, run = ParallelConfig(**axes), preset(PRESETS["dpo_mixed_pairs"])
    ends, while_away = [], []
    for moves in (False, True):
        state = fresh(folder, parallel, dtype, reference=folder)
        moved, layout = Offload(state), views(state)
        for _ in range(STEPS):
            watched_step(run, state, parallel)
            if moves:
                whole, parts = gather_hf(state, state.weights()), offload.storages(state)
                gradients = [b.grad_data.untyped_storage() for c in state.chunks for b in c.buffers]
                moved.to_host()
                moved.to_host()
                while_away.append([storage.nbytes() for storage in (*parts, *gradients)])
                exported = gather_hf(state, state.weights())
                assert all(torch.equal(exported[name], tensor) for name, tensor in whole.items())
                moved.to_device()
                moved.to_device()
            assert views(state) == layout
        ends.append(everything(state))
    straight, other = ends
    return {
        "away": while_away,
        "names": (list(straight), list(other)),
        "differ": [name for name in straight if not torch.equal(straight[name], other[name])],
        "moved_bytes": sum(len(t) for name, t in straight.items() if name.isdigit()),
    }


@pytest.mark.parametrize(
    ("family", "ranks", "axes", "dtype"),
    [
        ("qwen2", 1, {"distributed_optimizer": False}, "fp32"),
        ("qwen2", 1, {"distributed_optimizer": False}, "bf16"),
        ("qwen2", 2, {}, "fp32"),
        ("qwen2", 2, {}, "bf16"),
        ("qwen3_moe", 2, {"expert": 2}, "bf16"),
    ],
)
def test_steps_are_the_same_with_the_state_away_between_them(
    tmp_path: Path, family: str, ranks: int, axes: dict[str, Any], dtype: str
) -> None:
    folder = save_model(family, tmp_path, layers=2)
    found = run_ranks(with_and_without, ranks, folder, axes, dtype)
    for rank in found:
        first, second = rank["names"]
        assert first == second
        assert rank["differ"] == []
        assert len(rank["away"]) == STEPS
        assert {size for sizes in rank["away"] for size in sizes} == {0}
    # The reference, the moments and, in BF16, the FP32 weights are moved. The latter two are split over the replicas.
    count = sum(weight.numel() for weight in weights_of(folder))
    reference, state = {"fp32": (4, 8), "bf16": (2, 12)}[dtype]
    if family == "qwen2":
        whole = sum(rank["moved_bytes"] for rank in found)
        assert whole == pytest.approx((reference * ranks + state) * count, rel=0.02)


def weights_of(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def broken(folder: Path) -> tuple[str, bool]:
    """Apply an update whose gradient has NaN on one rank. Return its error, and whether the state is unchanged."""
    state = fresh(folder, ParallelConfig(), "fp32")
    before = everything(state)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
        if state.groups.rank == 1:
            chunk.buffers[0].grad_data[-100:] = torch.nan
        chunk.finish_grad_sync()
    with pytest.raises(NonFiniteGradient) as caught:
        apply_gradients(state)
    after = everything(state)
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    for message, same in run_ranks(broken, 2, save_qwen2(tmp_path, layers=2)):
        assert message == "the gradient norm is nan; no weight has been changed by it"
        assert same
