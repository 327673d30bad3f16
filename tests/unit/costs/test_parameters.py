"""Numbers of parameters agree with published sizes, with Hugging Face folders and with Megatron's models on the meta
device."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_chord.config import ParallelConfig
from megatron_chord.config_io import load_config
from megatron_chord.costs.parameters import (
    active_count,
    expert_count,
    largest_tensor,
    model_count,
    rank_count,
    uncut_count,
)
from megatron_chord.costs.stages import stage_layers
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import FAMILIES, read_shape
from megatron_chord.plan.memory import Training, optimizer_bytes
from megatron_chord.weights.mapping import padded_vocab_size
from megatron_chord.weights.reader import HFReader
from tests.support.published import CONFIGS, EXAMPLES, shape_of
from tests.support.ranks import run_ranks
from tests.support.tiny import save_model
from tests.unit.plan.per_rank import Asked, Held, conversion_plans, held

# Sizes of the published checkpoints: total_size in model.safetensors.index.json. BF16 has two bytes a parameter.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v2-lite": 15_706_484_224,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    assert model_count(shape_of(name)) == PUBLISHED[name]


def test_experts_and_active_parameters() -> None:
    shape = shape_of("qwen3-30b-a3b")
    # 48 layers x 128 experts x 3 projections of 2048 x 768.
    assert expert_count(shape) == 48 * 128 * 3 * 2048 * 768
    # The name says "A3B": 3.3 billion. The embedding (151936 x 2048) is only looked up and multiplies nothing.
    assert active_count(shape) / 1e9 == pytest.approx(3.3 - 0.31, abs=0.1)
    assert expert_count(shape_of("qwen2.5-7b")) == 0


def test_deepseek_v3_by_hand() -> None:
    """671 billion parameters, 37 billion of them active, without the layer for multi-token prediction."""
    hidden, heads = 7168, 128
    matrices = (
        hidden * 1536  # queries: the projection down and the projection up, with 128 + 64 a head
        + 1536 * heads * 192
        + hidden * (512 + 64)  # keys and values with rotated keys: down; and up: 128 + 128
        + 512 * heads * 256
        + heads * 128 * hidden
    )
    assert matrices == 187_105_280
    attention = matrices + 1536 + 512 + 2 * hidden  # and norms of the latents and the layer
    expert, dense, router = 3 * hidden * 2048, 3 * hidden * 18432, 256 * hidden
    head = 129280 * hidden
    whole = 2 * head + hidden + 61 * attention + 3 * dense + 58 * (257 * expert + router + 256)
    assert whole == 671_026_419_200
    shape = shape_of("deepseek-v3")
    assert model_count(shape) == whole
    assert expert_count(shape) == 58 * 256 * expert
    active = head + 61 * matrices + 3 * dense + 58 * (9 * expert + router)
    assert active_count(shape) == active == 36_624_596_992
    assert (active + head) / 1e9 == pytest.approx(
        37, rel=0.02
    )  # the published figure also counts the embedding
    # Every rank of vLLM's tensor axis holds norms, routers with their biases, and projections down.
    uncut = 61 * (hidden * (1536 + 576) + 1536 + 512 + 2 * hidden) + hidden + 58 * (router + 256)
    assert uncut_count(shape) == uncut


def test_stages_with_and_without_dense_layers() -> None:
    """DeepSeek-V2-Lite has 27 layers, the first of them dense. A stage has nine, or three in each of three chunks."""
    shape = shape_of("deepseek-v2-lite")
    hidden, width = 2048, 1408
    attention = hidden * 16 * 192 + hidden * 576 + 512 * 16 * 256 + 16 * 128 * hidden + 512 + 2 * hidden
    dense, sparse = 3 * hidden * 10944, 64 * hidden + 66 * 3 * hidden * width
    table = 102400 * hidden
    for parallel in (ParallelConfig(pipeline=3), ParallelConfig(pipeline=3, virtual_pipeline=3)):
        counts = [rank_count(shape, parallel, stage).total for stage in range(3)]
        assert counts == [
            table + 9 * attention + dense + 8 * sparse,
            9 * attention + 9 * sparse,
            9 * attention + 9 * sparse + hidden + table,
        ]
    assert stage_layers(12, ParallelConfig(pipeline=2, virtual_pipeline=3), 1) == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_counts_what_its_folder_holds(family: str, tied: bool, tmp_path: Path) -> None:
    reader = HFReader.of(save_model(family, tmp_path, tied=tied, layers=2, vocab=19))
    shape, sizes = read_shape(tmp_path), [math.prod(reader.shape(name)) for name in reader.names]
    assert model_count(shape) == sum(sizes)
    assert largest_tensor(shape) == max(sizes)


def test_every_family_counts_what_conversion_plans(tmp_path: Path) -> None:
    folders = [save_model(family, tmp_path / family, layers=2) for family in sorted(FAMILIES)]
    (plans,) = run_ranks(conversion_plans, 1, *folders)
    for folder, plan in zip(folders, plans, strict=True):
        assert sum(map(math.prod, plan.values())) == model_count(read_shape(folder)), folder.name


LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tensor=2, sequence_parallel=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(pipeline=2, virtual_pipeline=2, tensor=2, sequence_parallel=True),
]
WITH_EXPERTS = [
    ParallelConfig(expert=2, pipeline=2),
    ParallelConfig(expert=4, tensor=2, sequence_parallel=True),
]


def test_every_family_counts_what_megatron_builds(tmp_path: Path) -> None:
    asked = []
    for family in sorted(FAMILIES):
        for tied in (False, True):
            folder = save_model(family, tmp_path / f"{family}-{tied}", tied=tied, layers=4)
            layouts = LAYOUTS + (WITH_EXPERTS if read_shape(folder).experts else [])
            asked += [Asked(folder, parallel, (0, 1, 2, 3), 4) for parallel in layouts]
    (found,) = run_ranks(held, 1, *asked)
    for one, ranks in zip(asked, found, strict=True):
        for rank in ranks:
            count = rank_count(read_shape(one.folder), one.parallel, rank.stage)
            assert count.total == _size(rank), (one.folder.name, one.parallel, rank.stage)


def test_experts_over_a_large_world() -> None:
    shape = shape_of("qwen3-30b-a3b")
    parallel = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=4, expert=8, sequence_parallel=True)
    ranks = (0, 5, 16, 31)
    ((found,),) = run_ranks(held, 1, Asked(CONFIGS / "qwen3-30b-a3b", parallel, ranks, 32))
    assert {one.expert for one in found} == {0, 5, 7}
    for one in found:
        count = rank_count(shape, parallel, one.stage)
        assert count.total == _size(one)
        assert count.experts == sum(math.prod(s) for name, s in one.shapes.items() if ".experts." in name)
        training = Training(parallel=parallel, data=8, micro_tokens=8192, micro_batches=8, recompute="full")
        sharded = count.dense / one.replicas + count.experts / one.expert_replicas
        assert optimizer_bytes(count, training) == pytest.approx(12 * sharded)


def test_dry_run_of_70b() -> None:
    """chord_llama70b.yaml on 64 ranks: the planner counts what Megatron builds, and the ranks together hold the whole
    model."""
    folder = CONFIGS / "llama-3.1-70b"
    run = load_config(EXAMPLES / "chord_llama70b.yaml", [f"model.path={folder}", "parallel.ranks=64"])
    parallel, shape = run.parallel, read_shape(folder)
    assert (parallel.tensor, parallel.pipeline, parallel.context) == (4, 4, 1)
    # Megatron numbers ranks along tensor, then data, then pipeline. Here are the ranks of the first replica and the
    # very last.
    grid = tuple(tensor + 16 * stage for stage in range(4) for tensor in range(4))
    ((found,),) = run_ranks(held, 1, Asked(folder, parallel, (*grid, 63), 64))
    assert [(one.stage, one.tensor) for one in found[:16]] == [(s, t) for s in range(4) for t in range(4)]
    for one in found:
        assert rank_count(shape, parallel, one.stage).total == _size(one)
    assert found[16].shapes == found[15].shapes
    assert _assembled(found[:16], shape) == 70_553_706_496
    # The conversion of the checkpoint would write the same parameters, whole.
    ((plan,),) = run_ranks(conversion_plans, 1, folder)
    assert set().union(*(one.shapes for one in found)) == set(plan)
    assert sum(map(math.prod, plan.values())) == 70_553_706_496


def _size(one: Held) -> int:
    return sum(map(math.prod, one.shapes.values()))


def _assembled(grid: list[Held], shape: ModelShape) -> int:
    """Count the whole model's parameters from a grid of tensor x pipeline ranks.

    Parts of split parameters are added. Replicated parameters count once. The vocabulary's padding rows do not count.
    """
    total = 0
    for name in set().union(*(one.shapes for one in grid)):
        rule = shape.weights.entry(name).rule
        parts = [math.prod(one.shapes[name]) for one in grid if name in one.shapes]
        if rule.transform.axis is None:
            assert len(set(parts)) == 1
            total += parts[0]
            continue
        rows = padded_vocab_size(shape.vocab_size, len(parts)) - shape.vocab_size if rule.vocab else 0
        total += sum(parts) - rows * shape.hidden_size
    return total
