"""The planner's memory agrees with torch's own count for one training step on a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.model.specs import has_transformer_engine
from megatron_chord.plan.constants import CONSTANTS
from megatron_chord.plan.memory import Training, stage_memory
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import build_state
from megatron_chord.train.throughput import own_gpu
from megatron_chord.train.update import Update, apply_gradients, compute_gradients, prepare_batches
from tests.distributed.steps import start_groups
from tests.support.tiny import make_samples, save_model, terms_of, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 8192
SIZES: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "max_position_embeddings": TOKENS,
    "initializer_range": 0.02,
}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_peak_of_a_step(recompute: str, tmp_path: Path) -> None:
    """Layers without Transformer Engine keep more than its fused layers. Without it only the recomputed step is
    compared."""
    if recompute == "none" and not has_transformer_engine():
        pytest.skip("the formula is that of Transformer Engine's layers")
    folder = save_model("qwen2", tmp_path, layers=8, vocab=65536, **SIZES)
    shape, parallel = read_shape(folder), ParallelConfig()
    run = tiny_run(folder, max_tokens=TOKENS)
    groups = start_groups(parallel)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = ModelConfig(path=folder, dtype="bf16", recompute=recompute)  # type: ignore[arg-type]
    state = build_state(shape, model, parallel, OptimConfig(), groups=groups, steps=10)
    terms = terms_of(run)
    sample = make_samples(num_policy=0, num_sft=1)[0]
    ids = np.arange(TOKENS, dtype=np.int64) % 65536
    part = dataclasses.replace(sample.parts[0], positions=np.arange(1, TOKENS))
    long = dataclasses.replace(sample, token_ids=ids, parts=(part,))
    for _ in range(2):  # the first step makes Adam's moments
        plan = plan_step(
            with_scales([long, long], terms),
            max_tokens=TOKENS,
            layout=packing_layout(shape, parallel, 1),
            pad_id=0,
        )
        batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
        update = Update(weights={"policy": 0.0, "sft": 1.0}, counts=plan.counts)
        compute_gradients(state, batches, update, terms, temperature=1.0)
        apply_gradients(state)
    peak = torch.cuda.max_memory_allocated() - before
    training = Training(parallel=parallel, data=1, micro_tokens=TOKENS, micro_batches=2, recompute=recompute)
    constants = dataclasses.replace(CONSTANTS, cuda_bytes=0.0, fragmentation=0.0)
    assert peak == pytest.approx(stage_memory(shape, training, 0, constants).total, rel=0.15)


def test_the_kind_of_gpu_is_known_by_its_name() -> None:
    """torch counts bytes. It sees the vendor's figure, in GB or in GiB, without a small reserved part."""
    gpu = own_gpu()
    if gpu is None:
        pytest.skip(f"{torch.cuda.get_device_name()} is not among the kinds of costs/gpus.py")
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.9 * gpu.memory < total < 1.08 * gpu.memory
