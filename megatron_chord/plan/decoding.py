"""Estimates the time in which vLLM samples a step's responses by simulating the decode steps one by one.

A decode step reads the weights once, and the keys and values of every running sequence. With many sequences its matrix
products are the limit. Lengths follow an exponential distribution with the stated mean, cut off at the limit. One
sequence of each server is assumed to reach the limit, so there is always a longest answer. With ``rollout.partial`` a
step stops earlier (``decode_steps``). See docs/planning.md, "Sampling".
"""

from __future__ import annotations

import bisect
import math
import operator
from dataclasses import dataclass

from megatron_chord.costs.flops import decode_attention_flops
from megatron_chord.costs.gpus import Gpu
from megatron_chord.costs.parameters import Sizes, active_count, expert_count
from megatron_chord.families.shape import ModelShape
from megatron_chord.plan.constants import CONSTANTS, Constants
from megatron_chord.plan.memory import cache_parts, kv_bytes_per_token, server_count
from megatron_chord.plan.work import Work


@dataclass(frozen=True, kw_only=True)
class Server:
    """One of several equal servers."""

    gpu: Gpu
    tensor: int
    kv_tokens: int
    """Capacity of its KV cache, in tokens."""
    weight_bytes: float = 2
    """Bytes per parameter."""
    kv_dtype_bytes: float = 2
    flops_factor: float = 1.0
    """2 if matrix products are in FP8, whose peak rate is twice as high; otherwise 1."""
    spans_nodes: bool = False
    """True if the server's GPUs are on several nodes."""


def sampling_seconds(
    shape: ModelShape,
    server: Server,
    work: Work,
    *,
    servers: int,
    constants: Constants = CONSTANTS,
) -> float:
    """Seconds from the first request to the last answer of a step, from ``servers`` equal servers. inf if the KV cache
    cannot hold the longest answer."""
    if work.sequences == 0:
        return 0.0
    if server.kv_tokens < work.prompt_tokens + work.response_limit - 1:
        return math.inf
    stop, early = decode_steps(work), work.early_stop
    prompts = work.prompts + (early.extra_prompts if early and not early.carries else 0)
    # The steps in which running sequences may have begun: in this one, and in earlier ones if answers are carried.
    ages = range(0, work.response_limit, stop) if early and early.carries else range(1)
    own = prompts * work.rollouts / servers
    step = _DecodeStep(shape, server, constants)
    scale = exponential_scale(work.response_tokens, work.response_limit)
    seconds = 0.0
    for position in range(stop):
        lengths = [age + position for age in ages if age + position < work.response_limit]
        lives = [own * math.exp(-length / scale) for length in lengths]
        live = max(sum(lives), min(1.0, own))
        mean = sum(map(operator.mul, lives, lengths)) / sum(lives) if sum(lives) else position
        length = work.prompt_tokens + mean
        running = max(min(live, server.kv_tokens / max(length, 1.0)), 1e-9)
        # Sequences that do not fit wait.
        seconds += max(live / running, 1.0) * step.seconds(running, length)
    # The samples of one prompt share its prefill. Carried answers are read again, with the new weights.
    tokens = prompts * work.prompt_tokens
    if early and early.carries:
        carried = sum(age * math.exp(-age / scale) for age in ages)
        tokens += early.extra_prompts * work.prompt_tokens + work.sequences * carried
    rate = servers * server.tensor * constants.decode_flops * server.gpu.peak_flops * server.flops_factor
    return seconds + 2 * active_count(shape) * tokens / rate


def decode_steps(work: Work) -> int:
    """Number of decode steps of a step's sampling: the length limit of a response, or fewer with ``rollout.partial``.

    A prompt is finished when the longest of its responses is. Let M be the length of that, and e the extra prompts as a
    share of the prompts. If unfinished prompts are dropped, sampling stops after D decode steps when 1 / (1 + e) of all
    prompts are finished: P(M <= D) = 1 / (1 + e). If they are carried, a prompt takes part in ceil(M / D) steps, and
    1 + e times as many prompts are sampled as begin in each step. So the mean of ceil(M / D) is 1 + e in the long run,
    which is P(M > D) + P(M > 2 D) + ... = e. With ``max_carries`` c, a step waits for prompts that were carried c
    times, of which one is assumed to reach the limit: D is at least the limit / (c + 1).
    """
    limit, early = work.response_limit, work.early_stop
    if early is None:
        return limit
    scale = exponential_scale(work.response_tokens, limit)
    extra = early.extra_prompts / work.prompts

    def unfinished(position: int) -> float:
        """P(M > position)"""
        if position >= limit:
            return 0.0
        return 1 - (1 - math.exp(-position / scale)) ** work.rollouts

    def is_enough(stop: int) -> bool:
        if not early.carries:
            return unfinished(stop) <= extra / (1 + extra)
        return sum(map(unfinished, range(stop, limit, stop))) <= extra

    # More steps finish more prompts, so the smallest number is found by bisection.
    stop = 1 + bisect.bisect_left(range(1, limit), True, key=is_enough)
    return stop if early.max_carries is None else max(stop, -(-limit // (early.max_carries + 1)))


class _DecodeStep:
    def __init__(self, shape: ModelShape, server: Server, constants: Constants) -> None:
        sizes = Sizes.of(shape)
        bandwidth = constants.decode_bandwidth * server.gpu.bandwidth
        per_weight = server.weight_bytes / bandwidth
        experts = expert_count(shape) / server.tensor
        self._dense_s = (server_count(shape, server.tensor) - experts) * per_weight
        self._experts_s = experts * per_weight
        self._untouched = 1 - sizes.top_k / shape.experts.count if shape.experts else 0.0
        peak = constants.decode_flops * server.gpu.peak_flops * server.flops_factor
        self._product_s = 2 * active_count(shape) / (server.tensor * peak)
        # Seconds for one position of one sequence. With a latent, shared by all heads, products may take longer than
        # reading.
        part = kv_bytes_per_token(shape, server.kv_dtype_bytes) / cache_parts(shape, server.tensor)
        products = decode_attention_flops(shape) / server.tensor
        self._cache_s = max(part / bandwidth, products / (constants.decode_flops * server.gpu.peak_flops))
        self._fixed_s = constants.decode_step_s
        if server.tensor > 1:
            each = (
                constants.decode_all_reduce_apart_s if server.spans_nodes else constants.decode_all_reduce_s
            )
            self._fixed_s += 2 * shape.num_layers * each

    def seconds(self, running: float, length: float) -> float:
        """Seconds of one decode step with ``running`` sequences of ``length`` tokens."""
        # Only experts that at least one sequence chose are read; all experts are assumed to be equally likely.
        weights = self._dense_s + self._experts_s * (1 - self._untouched**running)
        return max(weights, running * self._product_s) + running * length * self._cache_s + self._fixed_s


def exponential_scale(mean: float, limit: float) -> float:
    """The scale of the exponential distribution that has this ``mean`` when it is cut off at ``limit``.

    A scale s gives the mean s (1 - exp(-limit / s)). The scale is inf if the mean is the limit.
    """
    if mean >= limit:
        return math.inf
    low, high = mean, mean
    while high * (1 - math.exp(-limit / high)) < mean and high < 1e6 * limit:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 - math.exp(-limit / middle)) < mean else (low, middle)
    return (low + high) / 2
