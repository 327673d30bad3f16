"""One update waits for the device only where it must, and never mixes host and device tensors: every method, some
layouts.

No GPU is needed. ``tests.support.watch`` replaces it by a device without numbers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.table import read_shape
from megatron_chord.train.state import build_state
from tests.distributed.watched import MICRO_BATCHES, PRESETS, preset, watched_step
from tests.support.ranks import run_ranks
from tests.support.tiny import save_qwen2
from tests.support.watch import Watch, stand_in_for_a_gpu

WAITS = {
    "megatron/core/optimizer/clip_grads.py": 1,  # the gradient norm, because clipping depends on it
    "megatron_chord/train/update.py": 1,  # the numbers of the update
}
UPLOADS = {"megatron_chord/data/transfer.py": MICRO_BATCHES}


def presets(
    folder: Path, axes: dict[str, Any], dtype: str, names: list[str]
) -> dict[str, dict[str, dict[str, int]]]:
    parallel = ParallelConfig(**axes)
    groups = stand_in_for_a_gpu(parallel)
    torch.set_num_threads(1)
    model = ModelConfig(path=folder, dtype=dtype)  # type: ignore[arg-type]
    state = build_state(
        read_shape(folder), model, parallel, OptimConfig(), groups=groups, steps=10, reference=folder
    )
    assert {parameter.device for parameter in state.parameters().values()} == {groups.device}
    found = {}
    for name in names:
        watch = watched_step(preset(PRESETS[name]), state, parallel)
        found[name] = {"waits": dict(watch.waits), "uploads": dict(watch.uploads)}
    return found


def assert_waits(ranks: int, folder: Path, axes: dict[str, Any], dtype: str, names: list[str]) -> None:
    for found in run_ranks(presets, ranks, folder, axes, dtype, names):
        assert list(found) == names
        for name, counts in found.items():
            assert counts == {"waits": WAITS, "uploads": UPLOADS}, name


def test_every_method_waits_for_its_norm_and_its_numbers_alone(tmp_path: Path) -> None:
    assert len(PRESETS) >= 20
    assert_waits(1, save_qwen2(tmp_path, layers=2), {}, "bf16", list(PRESETS))


@pytest.mark.parametrize(
    ("ranks", "axes", "dtype"),
    [
        (1, {"distributed_optimizer": False}, "fp32"),
        (2, {"tensor": 2, "sequence_parallel": True}, "bf16"),
        (2, {"context": 2}, "bf16"),
        (2, {}, "bf16"),
    ],
    ids=["plain", "tp2_sp", "cp2", "dp2"],
)
def test_every_layout_waits_for_its_norm_and_its_numbers_alone(
    tmp_path: Path, ranks: int, axes: dict[str, Any], dtype: str
) -> None:
    """The methods are those that compute something before the update or over whole sequences."""
    names = ["chord_phi", "gspo", "dpo_mixed_pairs", "prefix_rft", "self_distillation"]
    assert_waits(ranks, save_qwen2(tmp_path, layers=2), axes, dtype, names)


def deliberate() -> tuple[Counter[str], Counter[str], str]:
    """Do each thing that the watch must notice."""
    groups = stand_in_for_a_gpu(ParallelConfig())
    there = torch.zeros(4, device=groups.device)
    with Watch() as watch:
        there.sum().item()
        there.tolist()
        bool((there > 0).any())
        there.cpu()
        torch.ones(2).to(groups.device)
        try:
            there + torch.ones(4)
        except RuntimeError as error:
            return watch.waits, watch.uploads, str(error)
    return watch.waits, watch.uploads, "not noticed"


def test_the_check_notices_a_wait() -> None:
    ((waits, uploads, mixed),) = run_ranks(deliberate, 1)
    assert (sum(waits.values()), sum(uploads.values())) == (4, 1)
    assert "device" in mixed
