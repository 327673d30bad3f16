"""The packed Megatron model computes the logits that Transformers computes from the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import steps
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, save_qwen2

SEQUENCES = [
    np.random.default_rng(seed).integers(3, VOCAB, length).tolist()
    for seed, length in enumerate([17, 1, 40, 8, 60])
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [{}]),
        (2, [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}]),
        (4, [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}]),
    ],
)
def test_packed_logits_equal_transformers(
    tmp_path: Path, tied: bool, world_size: int, layouts: list[dict[str, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_qwen2(tmp_path, tied=tied)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = [reference(torch.tensor([ids])).logits[0].numpy() for ids in SEQUENCES]
    results = run_ranks(steps.packed_logits, world_size, folder, layouts, SEQUENCES)
    compared = 0
    for per_layout in results:
        for logits in per_layout:
            if logits is None:  # a stage other than the last has no logits
                continue
            for ours, theirs in zip(logits, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
                compared += 1
    assert compared >= len(layouts) * len(SEQUENCES)
