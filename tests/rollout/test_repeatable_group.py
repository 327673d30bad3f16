"""The process group of trainer and repeatable servers is formed without the NCCL variables of vLLM's own groups."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.ranks import run_ranks

PINNED, SETTING = "NCCL_PROTO", "Simple"
"""One of the variables that vLLM sets in its workers with VLLM_BATCH_INVARIANT."""


def join_while_pinned() -> list[str | None]:
    """Return the variable before, during and after the forming of two groups in a worker that has set it."""
    from vllm.utils import nccl

    from megatron_chord.rollout import vllm_engine

    seen: list[str | None] = []

    def join(*_: Any, **__: Any) -> Any:
        seen.append(os.environ.get(PINNED))
        return SimpleNamespace(close=lambda: None)

    os.environ.pop(PINNED, None)
    nccl._nccl_has_no_cache = lambda: True  # as with NCCL 2.29.7
    nccl.pin_nccl_env({PINNED: SETTING})
    vllm_engine.join_sender_group = join
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0, world_size=1, rank=0),
        model_config=SimpleNamespace(quantization=None),
    )
    engine = vllm_engine.WeightEngine(None, config, torch.device("cpu"), torch.nn.Module())
    seen.append(os.environ.get(PINNED))
    info = vllm_engine.InitInfo(
        transport="broadcast", timeout_s=5, endpoints=[["127.0.0.1", 1], ["127.0.0.1", 2]]
    )
    engine.init_transfer_engine(info)
    seen.append(os.environ.get(PINNED))
    return seen


def test_a_group_with_the_trainer_is_formed_without_variables_of_the_worker() -> None:
    assert run_ranks(join_while_pinned, 1) == [[SETTING, None, None, SETTING]]
