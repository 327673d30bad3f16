"""The predicted times of sampling are compared with hand arithmetic and with a naive simulation."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from megatron_chord.costs.gpus import GPUS
from megatron_chord.plan.constants import CONSTANTS
from megatron_chord.plan.decoding import Server, decode_steps, exponential_scale, sampling_seconds
from megatron_chord.plan.work import EarlyStop, Work
from tests.support.published import shape_of


def work(**changes: float) -> Work:
    values = {
        "prompts": 1,
        "rollouts": 2,
        "demonstrations": 0,
        "prompt_tokens": 100,
        "response_tokens": 1000,
        "demonstration_tokens": 0,
        "response_limit": 1000,
        "longest": 1100,
    }
    return Work(**values | changes)  # type: ignore[arg-type]


def test_all_responses_at_the_limit() -> None:
    """Each of 1000 steps reads 8B weights, and keys and values of two sequences. The sum over lengths is computed by
    hand."""
    server = Server(gpu=GPUS["h100"], tensor=1, kv_tokens=10**9)
    found = sampling_seconds(shape_of("llama-3.1-8b"), server, work(), servers=1)
    bandwidth = 0.7 * 3.35e12
    weights = 2 * 8_030_261_248 / bandwidth
    lengths = 1000 * 100 + 1000 * 999 / 2
    prefill = 2 * 7.5047e9 * 100 / (0.5 * 989e12)
    assert found == pytest.approx(
        1000 * (weights + CONSTANTS.decode_step_s) + 2 * lengths * 131072 / bandwidth + prefill, rel=1e-4
    )


def test_tensor_parallel_decoding_waits_for_its_all_reduces() -> None:
    shape = shape_of("llama-3.1-70b")
    one, eight = (
        sampling_seconds(shape, Server(gpu=GPUS["h100"], tensor=size, kv_tokens=10**9), work(), servers=1)
        for size in (1, 8)
    )
    fixed = 1000 * CONSTANTS.decode_step_s
    # Sizes are divided by 8, and 2 x 80 all-reduces of 30 us are added. The prefill is too short to matter.
    assert eight == pytest.approx((one - fixed) / 8 + fixed + 1000 * 160 * 30e-6, rel=1e-3)


def test_a_server_over_several_nodes_waits_longer() -> None:
    shape, gpu = shape_of("llama-3.1-70b"), GPUS["h100"]
    within, apart = (
        sampling_seconds(
            shape,
            Server(gpu=gpu, tensor=16, kv_tokens=10**9, spans_nodes=spans),
            work(),
            servers=1,
        )
        for spans in (False, True)
    )
    more = CONSTANTS.decode_all_reduce_apart_s - CONSTANTS.decode_all_reduce_s
    assert more > 0
    assert apart - within == pytest.approx(1000 * 160 * more)


def test_what_does_not_fit_the_cache_waits() -> None:
    """64 sequences take one decoding step. A cache for half of them reads the weights twice, and the cache once."""
    one_step = work(rollouts=64, response_limit=1, response_tokens=1)
    roomy, tight = (
        sampling_seconds(
            shape_of("llama-3.1-8b"),
            Server(gpu=GPUS["h100"], tensor=1, kv_tokens=size),
            one_step,
            servers=1,
        )
        for size in (10**9, 32 * 100)
    )
    assert tight - roomy == pytest.approx(
        2 * 8_030_261_248 / (0.7 * 3.35e12) + CONSTANTS.decode_step_s, rel=1e-6
    )


def test_servers_share_the_samples() -> None:
    shape, server = shape_of("llama-3.1-8b"), Server(gpu=GPUS["h100"], tensor=1, kv_tokens=10**9)
    four = sampling_seconds(shape, server, work(prompts=4), servers=4)
    assert four == pytest.approx(sampling_seconds(shape, server, work(), servers=1))
    assert sampling_seconds(shape, server, work(prompts=0), servers=1) == 0


def test_experts_are_read_as_they_are_chosen() -> None:
    """One sequence reads 8 of 128 experts. A thousand sequences read nearly all of them."""
    shape, gpu = shape_of("qwen3-30b-a3b"), GPUS["h100"]
    experts = 48 * 128 * 3 * 2048 * 768
    others = 30_532_122_624 - experts

    def seconds(sequences: int) -> float:
        short = work(prompts=1, rollouts=sequences, response_limit=1, response_tokens=1, prompt_tokens=1)
        return sampling_seconds(shape, Server(gpu=gpu, tensor=1, kv_tokens=10**9), short, servers=1)

    bandwidth = 0.7 * 3.35e12
    assert seconds(1) == pytest.approx(
        CONSTANTS.decode_step_s + 2 * (others + experts / 16) / bandwidth, rel=0.01
    )
    assert seconds(1000) == pytest.approx(
        CONSTANTS.decode_step_s + 2 * (others + experts) / bandwidth, rel=0.02
    )


@pytest.mark.parametrize(("tensor", "bound"), [(1, "products"), (8, "reading")])
def test_decoding_from_a_latent(tensor: int, bound: str) -> None:
    """DeepSeek-V3's 128 heads share what they read. One GPU takes longer for products, eight GPUs take longer for
    reading."""
    shape, gpu = shape_of("deepseek-v3"), GPUS["h100"]

    def seconds(length: int) -> float:
        one = work(prompts=1, rollouts=1, response_limit=1, response_tokens=1, prompt_tokens=length)
        return sampling_seconds(shape, Server(gpu=gpu, tensor=tensor, kv_tokens=10**9), one, servers=1)

    prefill = 2 * 36_624_596_992 / (tensor * 0.5 * 989e12)
    expected = {
        "products": 2 * 61 * 128 * (576 + 512) / tensor / (0.5 * 989e12),
        "reading": 61 * 576 * 2 / (0.7 * 3.35e12),
    }
    assert max(expected, key=lambda name: expected[name]) == bound
    assert (seconds(20_000) - seconds(10_000)) / 10_000 - prefill == pytest.approx(expected[bound], rel=1e-6)


@pytest.mark.parametrize(("mean", "limit"), [(398, 3969), (795, 3969), (3124, 3969), (10, 10_000)])
def test_scale_of_the_lengths(mean: float, limit: int) -> None:
    """The scale agrees with drawn lengths: an exponential distribution that is cut off at the limit."""
    draw, scale = random.Random(0), exponential_scale(mean, limit)
    lengths = [min(draw.expovariate(1 / scale), limit) for _ in range(200_000)]
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.01)


def test_no_scale_reaches_the_limit() -> None:
    assert exponential_scale(100, 100) == math.inf


def short(early_stop: EarlyStop | None, **changes: float) -> Work:
    """100 prompts whose responses have 100 tokens on average, with hardly any limit."""
    values = {"prompts": 100, "rollouts": 1, "response_tokens": 100, "response_limit": 10_000}
    return dataclasses.replace(work(**values | changes), early_stop=early_stop)


@pytest.mark.parametrize(
    ("rollouts", "early_stop", "expected"),
    [
        (1, None, 10_000),
        # With u = exp(-D / 100): u + u^2 + ... = u / (1 - u) = 1/4, so u = 1/5 and D = 100 ln 5 = 160.9.
        (1, EarlyStop(extra_prompts=25, carries=True), 161),
        # u = 1 - 1 / 1.25 = 1/5 as well.
        (1, EarlyStop(extra_prompts=25, carries=False), 161),
        # The longer of two: 2 u / (1 - u) - u^2 / (1 - u^2) = 1/4, which is 5 u^2 + 8 u = 1. So u = 0.11652 and
        # D = 100 x 2.1497.
        (2, EarlyStop(extra_prompts=25, carries=True), 215),
        # (1 - u)^2 = 1 / 1.25, so u = 0.10557 and D = 100 x 2.2484.
        (2, EarlyStop(extra_prompts=25, carries=False), 225),
        # A prompt that was carried 9 times is awaited, and reaches the limit of 10,000 in its tenth step.
        (1, EarlyStop(extra_prompts=25, carries=True, max_carries=9), 1000),
        (1, EarlyStop(extra_prompts=25, carries=True, max_carries=99), 161),
    ],
)
def test_an_early_stop_shortens_a_step(rollouts: int, early_stop: EarlyStop | None, expected: int) -> None:
    assert decode_steps(short(early_stop, rollouts=rollouts)) == expected


def test_responses_of_one_length_are_not_stopped() -> None:
    early_stop = EarlyStop(extra_prompts=25, carries=True)
    assert decode_steps(short(early_stop, response_tokens=50, response_limit=50)) == 50


@pytest.mark.parametrize("carries", [True, False])
def test_an_early_stop_agrees_with_a_naive_simulation(carries: bool) -> None:
    """400 of 500 prompts with 4 responses each, step after step, as ``sampling.context`` draws and carries them."""
    draw = random.Random(0)
    scale = exponential_scale(300, 1000)

    def longest() -> float:
        return max(min(draw.expovariate(1 / scale), 1000) for _ in range(4))

    left: list[float] = []
    stops = []
    for _ in range(60):
        asked = left + [longest() for _ in range(500 - len(left))]
        stop = sorted(asked)[399]
        trained = [index for index, length in enumerate(asked) if length <= stop][:400]
        rest = [max(0.0, length - stop) for index, length in enumerate(asked) if index not in trained]
        left = rest if carries else []
        stops.append(stop)
    found = decode_steps(
        short(
            EarlyStop(extra_prompts=100, carries=carries),
            prompts=400,
            rollouts=4,
            response_tokens=300,
            response_limit=1000,
        )
    )
    assert found == pytest.approx(sum(stops[20:]) / 40, rel=0.02)


def test_carried_tokens_are_sampled_once() -> None:
    """161 decode steps read the weights, instead of 10,000. Every step reads the keys and values of 64 beginning
    sequences and of the carried ones. All their tokens together are those of 64 whole sequences. With q = exp(-1/100)
    these are 64 / (1 - q) = 6432, with 64 q / (1 - q)^2 = 640,000 positions before them."""
    early_stop = EarlyStop(extra_prompts=16, carries=True)
    server = Server(gpu=GPUS["h100"], tensor=1, kv_tokens=10**9)
    found = sampling_seconds(shape_of("llama-3.1-8b"), server, short(early_stop, prompts=64), servers=1)
    bandwidth, flops = 0.7 * 3.35e12, 0.5 * 989e12
    q = math.exp(-1 / 100)
    positions = 64 * (100 / (1 - q) + q / (1 - q) ** 2)
    # Prompts of 64 new and 16 carried sequences, and what these have already: 64 x 161 x (u + 2 u^2 + ...) tokens.
    u = math.exp(-161 / 100)
    read_again = 80 * 100 + 64 * 161 * u / (1 - u) ** 2
    assert found == pytest.approx(
        161 * (2 * 8_030_261_248 / bandwidth + CONSTANTS.decode_step_s)
        + positions * 131072 / bandwidth
        + 2 * 7.5047e9 * read_again / flops,
        rel=1e-4,
    )


def test_dropped_answers_cost_time_only() -> None:
    """80 sequences begin in every step, and 161 decode steps are made, with what is alive of them."""
    early_stop = EarlyStop(extra_prompts=16, carries=False)
    server = Server(gpu=GPUS["h100"], tensor=1, kv_tokens=10**9)
    found = sampling_seconds(shape_of("llama-3.1-8b"), server, short(early_stop, prompts=64), servers=1)
    bandwidth, flops = 0.7 * 3.35e12, 0.5 * 989e12
    positions = sum(80 * math.exp(-at / 100) * (100 + at) for at in range(161))
    assert found == pytest.approx(
        161 * (2 * 8_030_261_248 / bandwidth + CONSTANTS.decode_step_s)
        + positions * 131072 / bandwidth
        + 2 * 7.5047e9 * 80 * 100 / flops,
        rel=1e-4,
    )
