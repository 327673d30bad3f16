"""Pipeline stages of unequal length: their layers, the lists that are refused, and the balance of their work."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.balance import balanced_stages, slowdown
from megatron_chord.costs.flops import head_flops, layer_flops, train_flops
from megatron_chord.costs.parameters import rank_count
from megatron_chord.costs.stages import stage_layers
from megatron_chord.model.build import check_overrides, check_shape
from tests.support.published import shape_of


def test_layers_of_a_stage() -> None:
    plain = ParallelConfig(pipeline=3, stages=(1, 4, 2))
    assert [stage_layers(7, plain, stage) for stage in range(3)] == [[0], [1, 2, 3, 4], [5, 6]]
    chunks = ParallelConfig(pipeline=2, virtual_pipeline=2, stages=(3, 1, 2, 1))
    assert [stage_layers(7, chunks, stage) for stage in range(2)] == [[0, 1, 2, 4, 5], [3, 6]]


def test_parameters_of_unequal_stages() -> None:
    """DeepSeek-V2-Lite: the first stage has the embedding and layer 0, which is dense. The last stage has all other
    layers."""
    shape = shape_of("deepseek-v2-lite")
    whole = rank_count(shape, ParallelConfig(), 0).total
    counts = [rank_count(shape, ParallelConfig(pipeline=2, stages=(1, 26)), stage) for stage in range(2)]
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048 + 512 + 2 * 2048
    assert counts[0].total == 102400 * 2048 + attention + 3 * 2048 * 10944
    assert counts[0].experts == 0
    assert sum(count.total for count in counts) == whole


@pytest.mark.parametrize("name", ["llama-3.1-70b", "deepseek-v3", "deepseek-v2-lite"])
def test_layers_and_head_are_the_model(name: str) -> None:
    shape = shape_of(name)
    together = sum(layer_flops(shape, 3000.0, "none")) + head_flops(shape)
    assert together == pytest.approx(train_flops(shape, 3000.0), rel=1e-12)


# The head in layers: 8 x 128256 x 8192 FLOPs are 1.637 of Llama-70B's 6 x 855,638,016, and 2.111 for DeepSeek-V3.
BALANCED: list[tuple[str, int, tuple[int, ...], float]] = [
    ("llama-3.1-70b", 4, (20, 20, 21, 19), 21 / ((80 + 1.637) / 4)),
    ("deepseek-v3", 4, (16, 16, 16, 13), 16 / ((61 + 2.111) / 4)),
]


@pytest.mark.parametrize(("name", "pipeline", "stages", "ratio"), BALANCED)
def test_balanced_by_hand(name: str, pipeline: int, stages: tuple[int, ...], ratio: float) -> None:
    shape, work = shape_of(name), {"length": 0.0, "recompute": "none"}
    assert balanced_stages(shape, pipeline=pipeline, **work) == stages  # type: ignore[arg-type]
    parallel = ParallelConfig(pipeline=pipeline, stages=stages)
    # 3 of DeepSeek-V3's layers are dense. Their MLP of 9 x 7168 x 2048 differs by 1 % from the experts and the router.
    assert slowdown(shape, parallel, **work) == pytest.approx(ratio, rel=2e-3)  # type: ignore[arg-type]
    assert slowdown(shape, ParallelConfig(), **work) == 1.0  # type: ignore[arg-type]


def test_equal_stages_wait_for_the_one_with_the_head() -> None:
    shape, parallel = shape_of("llama-3.1-70b"), ParallelConfig(pipeline=4)
    found = slowdown(shape, parallel, length=0.0, recompute="none")
    assert found == pytest.approx((20 + 1.637) / ((80 + 1.637) / 4), rel=1e-4)
    once = slowdown(shape, parallel, length=0.0, recompute="none", head_passes=1)
    assert once == pytest.approx((20 + 0.75 * 1.637) / ((80 + 0.75 * 1.637) / 4), rel=1e-4)


def test_recomputation_and_long_sequences_make_the_head_smaller() -> None:
    shape = shape_of("llama-3.1-70b")
    parallel = ParallelConfig(pipeline=2, stages=(41, 39))
    # Attention has 3 x 2 x 8192 FLOPs a layer for each token of the sequence.
    layer, head = 6 * 855_638_016 + 6 * 8192 * 10_000, 8 * 128256 * 8192
    found = slowdown(shape, parallel, length=10_000, recompute="full")
    layer *= 4 / 3
    assert found == pytest.approx(max(41 * layer, 39 * layer + head) / ((80 * layer + head) / 2))


def test_chunks_share_a_stage() -> None:
    """A stage's two chunks have almost equal numbers of layers, and the head counts as layers of the last stage."""
    shape = shape_of("deepseek-v2-lite")
    found = balanced_stages(shape, pipeline=2, chunks=2, length=0.0, recompute="none")
    assert sum(found) == 27
    own = [found[0] + found[2], found[1] + found[3]]
    head = 8 * 102400 * 2048 / (sum(layer_flops(shape, 0.0, "none")) / 27)
    assert abs(own[0] - own[1] - head) <= 1
    assert all(abs(found[stage] - found[stage + 2]) <= 1 for stage in (0, 1))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stages": (61,)}, "parallel.stages needs parallel.pipeline > 1"),
    (
        {"pipeline": 2, "stages": (20, 20, 21)},
        r"stages lists 3 numbers of layers, expected 2 \(parallel.pipeline 2 x",
    ),
    (
        {"pipeline": 2, "virtual_pipeline": 2, "stages": (30, 31)},
        "expected 4 .parallel.pipeline 2 x parallel.virtual_pipeline 2",
    ),
    ({"pipeline": 2, "stages": (61, 0)}, r"at least one layer, got \[61, 0\]"),
    (
        {"pipeline": 4, "stages": (15, 15, 15, 15)},
        r"are 60 layers together, the model has 61 .* \[16, 16, 16, 13\]",
    ),
    (
        {"pipeline": 4},
        r"61 layers / \(parallel.pipeline 4 x parallel.virtual_pipeline 1\) "
        r"\(parallel.stages can be \[16, 16, 16, 13\]",
    ),
    ({"pipeline": 64}, r"61 layers / \(parallel.pipeline 64 x parallel.virtual_pipeline 1\)$"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_shape(shape_of("deepseek-v3"), ParallelConfig(**settings))


@pytest.mark.parametrize("name", ["pipeline_model_parallel_layout", "num_layers_in_first_pipeline_stage"])
def test_megatrons_own_settings_are_not_a_second_way(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be set: parallel.stages sets it"):
        check_overrides({name: 1}, shape_of("deepseek-v3"))
