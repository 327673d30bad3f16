"""One process acts as any rank of a large run. It has Megatron's real groups over torch's fake process group.

The fake group's collectives do nothing. That is enough to build a rank's model on the meta device and inspect it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.model.build import build_chunks, transformer_config
from megatron_chord.runtime import adam, cpu, megatron
from megatron_chord.runtime.parallel import axis_sizes


@contextmanager
def rank_of(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[None]:
    """Set Megatron's parallel state to that of rank ``rank`` of ``world_size``."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.install()
    megatron.complete_names()
    adam.install_if_needed()
    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(**axis_sizes(parallel), create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def chunks_on_meta(shape: ModelShape, parallel: ParallelConfig) -> list[Any]:
    """Build this rank's model chunks as the trainer does, without memory."""
    config = transformer_config(shape, ModelConfig(path=Path("."), dtype="bf16"), parallel)
    with torch.device("meta"):
        return build_chunks(config, shape)
