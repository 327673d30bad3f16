"""``rollout.offload`` frees memory of a GPU, and the state comes back unchanged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.train.offload import Offload, storages
from megatron_chord.train.state import build_state
from tests.distributed.steps import start_groups
from tests.distributed.watched import PRESETS, preset, watched_step
from tests.support.tiny import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "initializer_range": 0.02,
}


def test_memory_is_freed_for_other_processes(tmp_path: Path) -> None:
    folder = save_model("qwen2", tmp_path, layers=8, vocab=65536, **SIZES)
    parallel = ParallelConfig()
    model = ModelConfig(path=folder, dtype="bf16")
    state = build_state(
        read_shape(folder), model, parallel, OptimConfig(), groups=start_groups(parallel), steps=10
    )
    watched_step(preset(PRESETS["chord_phi"]), state, parallel)  # makes Adam's moments
    held = [torch.empty(0, dtype=torch.uint8, device="cuda").set_(s).clone().cpu() for s in storages(state)]
    count = sum(parameter.numel() for parameter in state.parameters().values())
    offload = Offload(state)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    begin = time.perf_counter()
    offload.to_host()
    away = time.perf_counter() - begin
    more, _ = torch.cuda.mem_get_info()
    # Freed are FP32 weights, two moments and FP32 gradients. The allocator cannot return some 2 MB of each block.
    assert more - free == pytest.approx((12 + 4) * count, rel=0.05)
    begin = time.perf_counter()
    offload.to_device()
    torch.cuda.synchronize()
    back = time.perf_counter() - begin
    print(f"{12 * count / 1e9:.1f} GB: away in {away:.2f} s (pinning included), back in {back:.2f} s")
    for storage, before in zip(storages(state), held, strict=True):
        now = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).cpu()
        assert torch.equal(now, before)
    watched_step(preset(PRESETS["chord_phi"]), state, parallel)
