"""Memory agrees with hand arithmetic, Megatron's own schedules and published layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.gpus import GPUS
from megatron_chord.families.shape import ModelShape
from megatron_chord.losses.logprobs import CHUNK_BYTES
from megatron_chord.plan.constants import GB
from megatron_chord.plan.memory import (
    Numerics,
    Training,
    head_bytes,
    kept_at_once,
    kv_bytes_per_token,
    layer_activations,
    server_memory,
    stage_memory,
)
from tests.support.published import shape_of
from tests.support.ranks import run_ranks
from tests.unit.plan.per_rank import warm_ups


def training(parallel: ParallelConfig, **others: object) -> Training:
    defaults = {"data": 1, "micro_tokens": 16384, "micro_batches": 64, "recompute": "full"}
    return Training(parallel=parallel, **defaults | others)  # type: ignore[arg-type]


# GB of weights, gradients, optimizer state and activations of stage 0, with FP32 gradients and all layers recomputed.
# They were worked out by hand from the models' sizes (2, 4 and 12 / (DP x CP) bytes a parameter).
LAYOUTS = [
    ("qwen2.5-7b", {}, 8, 16384, (15.2, 30.5, 11.4, 5.9)),
    ("qwen2.5-7b", {"tensor": 2}, 4, 16384, (7.6, 15.2, 11.4, 2.9)),
    ("qwen2.5-7b", {"tensor": 2}, 4, 32768, (7.6, 15.2, 11.4, 5.9)),
    ("qwen2.5-32b", {"tensor": 8}, 2, 16384, (8.2, 16.4, 24.6, 1.8)),
    ("qwen2.5-32b", {"tensor": 4, "pipeline": 4}, 2, 16384, (4.3, 8.6, 12.9, 3.6)),
    ("qwen2.5-32b", {"tensor": 4, "pipeline": 2, "context": 2}, 2, 32768, (8.2, 16.4, 12.3, 3.6)),
    ("llama-3.1-70b", {"tensor": 4, "pipeline": 4}, 4, 16384, (9.1, 18.2, 13.6, 6.5)),
    ("llama-3.1-70b", {"tensor": 8, "pipeline": 2}, 2, 16384, (8.8, 17.6, 26.5, 3.2)),
    ("qwen2.5-72b", {"tensor": 8, "pipeline": 4}, 2, 16384, (4.7, 9.4, 14.1, 3.3)),
]


@pytest.mark.parametrize(("name", "axes", "data", "tokens", "expected"), LAYOUTS)
def test_parts_of_a_stage(
    name: str, axes: dict[str, int], data: int, tokens: int, expected: tuple[float, ...]
) -> None:
    parallel = ParallelConfig(**axes, sequence_parallel=axes.get("tensor", 1) > 1)  # type: ignore[arg-type]
    memory = stage_memory(shape_of(name), training(parallel, data=data, micro_tokens=tokens), 0)
    found = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    assert [value / GB for value in found] == pytest.approx(expected, abs=0.06)
    assert memory.total == pytest.approx(sum(found) + memory.head + memory.overhead)


def whole_layer(shape: ModelShape, asked: Training, number: int = 0) -> float:
    return layer_activations(shape, replace(asked, recompute="none"), number).kept


def test_bytes_of_a_layer() -> None:
    """A layer has 8h + 2(q + 2k) + 2q + 6f bytes a token in BF16."""
    one = training(ParallelConfig())
    # Qwen2.5-7B: h 3584, q 3584, k 512, f 18944. Llama-70B: 8192, 8192, 1024, 28672.
    assert whole_layer(shape_of("qwen2.5-7b"), one) == 8 * 3584 + 2 * 4608 + 2 * 3584 + 6 * 18944
    assert whole_layer(shape_of("qwen2.5-7b"), one) == 158720
    assert whole_layer(shape_of("llama-3.1-70b"), one) == 274432
    cut = training(ParallelConfig(tensor=4, sequence_parallel=True))
    assert whole_layer(shape_of("llama-3.1-70b"), cut) == 274432 / 4
    # Without sequence parallelism every rank holds whole residuals and norms: 8h.
    whole = training(ParallelConfig(tensor=4))
    assert whole_layer(shape_of("llama-3.1-70b"), whole) == (274432 - 8 * 8192) / 4 + 8 * 8192


def test_bytes_of_a_layer_whose_mlp_is_computed_again() -> None:
    """Qwen2.5-7B saves 6f of 158,720 bytes a token. Qwen3-30B-A3B saves its experts and all that is sent to them and
    back."""
    mlp = training(ParallelConfig(), recompute="mlp")
    found = layer_activations(shape_of("qwen2.5-7b"), mlp)
    assert (found.kept, found.again) == (158720 - 6 * 18944, 6 * 18944)
    found = layer_activations(shape_of("qwen3-30b-a3b"), mlp)
    assert found.again == 8 * (6 * 768 + 2 * 2048 + 2 * 2048)
    memory = stage_memory(shape_of("qwen2.5-7b"), mlp, 0)
    assert memory.activations == (28 * (158720 - 6 * 18944) + 6 * 18944) * 16384


def test_bytes_of_a_layer_of_experts() -> None:
    """Qwen3-30B-A3B: each token goes to 8 of 128 experts of width 768. That is 8 copies in, 8 results out, and 6 x 768
    inside."""
    found = whole_layer(shape_of("qwen3-30b-a3b"), training(ParallelConfig()))
    assert found == 8 * 2048 + 2 * (4096 + 2 * 512) + 2 * 4096 + 8 * (6 * 768 + 2 * 2048 + 2 * 2048)


def test_bytes_of_latent_attention() -> None:
    """DeepSeek-V3 has latents of 1536 and 512 before and after their norms, and 128 heads of 192 (query, key) and 128
    (value, output).

    Its MLPs have a width of 18432, or there is a shared expert and 8 of 256, each of width 2048.
    """
    shape, h = shape_of("deepseek-v3"), 7168
    attention = 8 * h + 4 * (1536 + 512) + 2 * 128 * (192 + 192 + 128 + 128)
    dense = attention + 6 * 18432
    sparse = attention + 6 * 2048 + 8 * (6 * 2048 + 4 * h)
    one = training(ParallelConfig())
    assert [whole_layer(shape, one, number) for number in (0, 2, 3, 60)] == [
        dense,
        dense,
        sparse,
        sparse,
    ]
    whole = stage_memory(shape, training(ParallelConfig(), recompute="none"), 0)
    assert whole.activations == pytest.approx((3 * dense + 58 * sparse) * 16384)
    recomputed = stage_memory(shape, one, 0)
    assert recomputed.activations == pytest.approx((61 * 2 * h + max(dense, sparse)) * 16384)


def test_passes_in_flight_are_megatrons() -> None:
    """The passes are the warm-up and the one after it, as Megatron's schedule counts them."""
    asked = [
        (ParallelConfig(pipeline=stages, virtual_pipeline=chunks), micro_batches)
        for stages, chunks in ((2, None), (4, None), (4, 2), (4, 5), (8, 5), (2, 10))
        for micro_batches in (stages, 2 * stages, 16 * stages)
    ]
    (found,) = run_ranks(warm_ups, 1, *asked)
    for (parallel, micro_batches), warm_up in zip(asked, found, strict=True):
        chunks = parallel.virtual_pipeline or 1
        kept = [
            kept_at_once([1.0] * chunks, parallel, stage, micro_batches) for stage in range(parallel.pipeline)
        ]
        most = chunks * micro_batches
        assert kept == [min(count + 1, most) for count in warm_up], (parallel, micro_batches)


@pytest.mark.parametrize("micro_batches", [4, 8, 20])
@pytest.mark.parametrize("chunks", [(3.0, 1.0), (1.0, 3.0), (2.0, 5.0, 1.0)])
@pytest.mark.parametrize("stage", range(4))
def test_unequal_chunks_in_flight(stage: int, chunks: tuple[float, ...], micro_batches: int) -> None:
    """The expected numbers come from playing the schedule pass by pass, with a dictionary of what each pass leaves
    behind."""
    stages, count = 4, len(chunks)
    order = [
        (first + number, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in range(count)
        for number in range(stages)
    ]
    forward, backward = iter(order), iter([(number, count - 1 - chunk) for number, chunk in order])
    kept: dict[tuple[int, int], float] = {}
    most = 0.0
    for _ in range(min(2 * (stages - stage - 1) + (count - 1) * stages, len(order))):
        number, chunk = next(forward)
        kept[number, chunk] = chunks[chunk]
    for number, chunk in forward:
        kept[number, chunk] = chunks[chunk]
        most = max(most, sum(kept.values()))
        del kept[next(backward)]
    most = max(most, sum(kept.values()))
    for done in backward:
        del kept[done]
    assert not kept
    parallel = ParallelConfig(pipeline=stages, virtual_pipeline=count)
    assert kept_at_once(chunks, parallel, stage, micro_batches) == most


def test_a_shorter_first_stage_keeps_less() -> None:
    """80 layers over 4 stages, with 14 on the first: it keeps the inputs of 4 micro-batches, 2 x 8192 bytes per
    token."""
    shape, parallel = shape_of("llama-3.1-70b"), ParallelConfig(pipeline=4, stages=(14, 22, 22, 22))
    found = stage_memory(shape, training(parallel), 0)
    assert found.activations == pytest.approx((4 * 14 * 2 * 8192 + 274432) * 16384)
    assert found.parameters == 14 * (855_638_016 + 2 * 8192) + 128256 * 8192


def test_without_recomputation_every_layer_is_kept() -> None:
    shape, parallel = shape_of("qwen2.5-7b"), ParallelConfig(tensor=4, sequence_parallel=True)
    memory = stage_memory(shape, training(parallel, data=2, recompute="none"), 0)
    assert memory.activations == 28 * 158720 / 4 * 16384  # 18.2 GB


def test_the_optimizer_is_whole_without_its_sharding() -> None:
    shape = shape_of("qwen2.5-7b")
    whole = stage_memory(shape, training(ParallelConfig(distributed_optimizer=False), data=8), 0)
    assert whole.optimizer == 12 * 7_615_616_512
    fp32 = stage_memory(shape, training(ParallelConfig(), data=8, numerics=Numerics.of("fp32")), 0)
    assert fp32.optimizer == 8 / 8 * 7_615_616_512  # there is no second copy of the weights
    assert fp32.weights == 4 * 7_615_616_512


def test_the_optimizer_of_experts_is_sharded_over_fewer_ranks() -> None:
    """With 32 ranks and expert 8, 4 ranks hold the same experts, and 32 ranks hold the same other weights."""
    shape = shape_of("qwen3-30b-a3b")
    experts = 48 * 128 * 3 * 2048 * 768
    memory = stage_memory(shape, training(ParallelConfig(expert=8), data=32), 0)
    others = 30_532_122_624 - experts
    assert memory.optimizer == pytest.approx(12 * (experts / 8 / 4 + others / 32))
    assert memory.parameters == experts // 8 + others


def test_a_reference_costs_its_weights() -> None:
    shape = shape_of("qwen2.5-7b")
    one = stage_memory(shape, training(ParallelConfig()), 0)
    two = stage_memory(shape, training(ParallelConfig(), reference=True), 0)
    assert two.total - one.total == pytest.approx(2 * 7_615_616_512)


def test_the_head_works_in_chunks() -> None:
    """TP2 has 76032 rows of 3584. There are an FP32 sum and a BF16 copy of the weight's gradient, and four BF16
    [tokens, h] matrices."""
    parallel = ParallelConfig(tensor=2, sequence_parallel=True)
    found = head_bytes(shape_of("qwen2.5-7b"), training(parallel, micro_tokens=8192))
    assert found == CHUNK_BYTES + 6 * 76032 * 3584 + 4 * 2 * 8192 * 3584
    stages = [
        stage_memory(shape_of("qwen2.5-7b"), training(ParallelConfig(pipeline=2)), stage) for stage in (0, 1)
    ]
    assert stages[0].head == 0 < stages[1].head


# 0.60 and 0.85 of 80 GB, minus BF16 weights and 3 GB a GPU, divided by the bytes of a token, in thousands of tokens.
CAPACITY = [
    ("qwen2.5-7b", 1, 0.60, 2, 519),
    ("qwen2.5-7b", 1, 0.85, 2, 868),
    ("qwen2.5-7b", 1, 0.85, 1, 1001),
    ("qwen2.5-32b", 2, 0.60, 2, 93),
    ("qwen2.5-32b", 4, 0.60, 2, 437),
    ("qwen2.5-32b", 4, 0.85, 1, 867),
    ("llama-3.1-70b", 4, 0.85, 2, 363),
    ("llama-3.1-70b", 8, 0.60, 2, 668),
    ("llama-3.1-70b", 8, 0.85, 1, 1372),
]


@pytest.mark.parametrize(("name", "tensor", "utilization", "weight_bytes", "thousands"), CAPACITY)
def test_kv_capacity(
    name: str, tensor: int, utilization: float, weight_bytes: float, thousands: float
) -> None:
    found = server_memory(
        shape_of(name),
        replace(GPUS["h100"], visible=80e9),
        tensor=tensor,
        utilization=utilization,
        weight_bytes=weight_bytes,
    )
    assert found.tokens / 1000 == pytest.approx(thousands, abs=0.6)


def test_vllm_takes_a_share_of_what_the_driver_reports() -> None:
    """79.1 GiB of an H100 of 80 GB, of which Qwen3-235B's weights leave little."""
    found = server_memory(shape_of("qwen3-235b-a22b"), GPUS["h100"], tensor=8, utilization=0.8)
    assert found.reserved == pytest.approx(0.8 * 79.1 * 2**30)


def test_kv_bytes() -> None:
    assert kv_bytes_per_token(shape_of("qwen2.5-7b")) == 57344
    assert kv_bytes_per_token(shape_of("llama-3.1-70b")) == 327680
    # 4 key-value heads over 8 GPUs: every head is stored twice.
    four = server_memory(shape_of("qwen3-30b-a3b"), GPUS["h100"], tensor=4, utilization=0.5, cache_bytes=1e9)
    eight = server_memory(shape_of("qwen3-30b-a3b"), GPUS["h100"], tensor=8, utilization=0.5, cache_bytes=1e9)
    assert four.tokens == eight.tokens


def test_every_gpu_keeps_the_whole_latent() -> None:
    """DeepSeek-V3's published 70 KB a token: 61 layers of 512 + 64 numbers in BF16."""
    shape = shape_of("deepseek-v3")
    assert kv_bytes_per_token(shape) == 61 * 576 * 2 == 70272
    for tensor in (1, 16):
        found = server_memory(shape, GPUS["h200"], tensor=tensor, utilization=0.9, cache_bytes=70272e5)
        assert found.tokens == 100_000
    # Every GPU holds 1,030,919,680 parameters (tests/unit/costs). The other parameters are split.
    assert found.weights == pytest.approx(2 * (1_030_919_680 + (671_026_419_200 - 1_030_919_680) / 16))


def test_a_stated_cache_is_what_a_server_takes() -> None:
    found = server_memory(
        shape_of("qwen2.5-7b"), GPUS["h100"], tensor=1, utilization=0.6, cache_bytes=57344e5
    )
    assert found.tokens == 100_000
    assert found.reserved == pytest.approx(2 * 7_615_616_512 + 3e9 + 57344e5)
