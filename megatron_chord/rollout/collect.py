"""Prompts -> sampled, graded groups -> TrainSamples. Runs on the coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_chord.data.templates import ChatTemplate
from megatron_chord.losses.policy import group_advantages
from megatron_chord.records import Expert, Prompt, Rollout, RolloutGroup, TrainSample
from megatron_chord.rewards.pool import Grade, GraderPool
from megatron_chord.rollout.client import RolloutClient, SampleRequest


class TooManyGraderErrors(RuntimeError):
    """More gradings of a step failed than the run allows: rewards would be about the grader, not the policy."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample: the same for every prompt of a call."""

    num_samples: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GradedRollouts:
    """One prompt's rollouts with their grades, in the engine's order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    texts: tuple[str, ...]
    grades: tuple[Grade, ...]


def sample_seed(run_seed: int, step: int, index: int) -> int:
    """Seed of the ``index``-th request of a step: a pure function, so that a resumed run samples the same tokens."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def sample(
    clients: Sequence[RolloutClient],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seeds: Sequence[int],
    version: int,
    deadline_s: float,
    on_done: Callable[[int], None] | None = None,
) -> list[tuple[Rollout, ...]]:
    """Rollouts of every prompt, all of weight version ``version``; requests are dealt out to the servers in turn.

    Raises RolloutError when any request fails for good: a step never goes on with half a batch.
    """
    requests = [
        SampleRequest(
            prompt_ids=prompt.token_ids,
            num_samples=sampling.num_samples,
            seed=seed,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=sampling.stop_token_ids,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    done = [0] * len(clients)

    def serve(server: int) -> list[tuple[Rollout, ...]]:
        def count(finished: int) -> None:
            done[server] = finished
            if on_done is not None:
                on_done(sum(done))

        share = requests[server :: len(clients)]
        return clients[server].generate(share, version=version, deadline_s=deadline_s, on_done=count)

    pool = ThreadPoolExecutor(len(clients))
    try:
        shares = list(pool.map(serve, range(len(clients))))
    finally:
        # Not waiting: on a signal the server is stopped next, which ends the requests.
        pool.shutdown(wait=False, cancel_futures=True)
    return [shares[index % len(clients)][index // len(clients)] for index in range(len(requests))]


def grade(
    prompts: Sequence[Prompt],
    sampled: Sequence[tuple[Rollout, ...]],
    *,
    template: ChatTemplate,
    graders: GraderPool,
    max_error_rate: float,
) -> list[GradedRollouts]:
    """Decode and grade every rollout.

    Raises:
        TooManyGraderErrors: more than ``max_error_rate`` of the gradings failed.
    """
    texts = [tuple(template.decode(rollout.token_ids) for rollout in rollouts) for rollouts in sampled]
    items = [(text, prompt.truth) for prompt, group in zip(prompts, texts, strict=True) for text in group]
    grades = graders.grade_all(items)
    errors = [grade.error for grade in grades if grade.error is not None]
    if len(errors) > max_error_rate * len(grades):
        raise TooManyGraderErrors(
            f"{len(errors)} of {len(grades)} gradings failed (reward.max_error_rate {max_error_rate}); "
            f"the first: {errors[0]}"
        )
    graded, start = [], 0
    for prompt, rollouts, group in zip(prompts, sampled, texts, strict=True):
        stop = start + len(rollouts)
        graded.append(
            GradedRollouts(prompt=prompt, rollouts=rollouts, texts=group, grades=tuple(grades[start:stop]))
        )
        start = stop
    return graded


def make_groups(graded: Sequence[GradedRollouts], *, use_std: bool, eps: float) -> list[RolloutGroup]:
    """Groups with advantages. A rollout whose grading failed is left out, and a group of fewer than two with it."""
    groups = []
    for item in graded:
        kept = [i for i, grade in enumerate(item.grades) if grade.score is not None]
        if len(kept) < 2:
            continue
        rewards = tuple(float(item.grades[i].score or 0.0) for i in kept)
        groups.append(
            RolloutGroup(
                prompt=item.prompt,
                rollouts=tuple(item.rollouts[i] for i in kept),
                texts=tuple(item.texts[i] for i in kept),
                rewards=rewards,
                advantages=group_advantages(rewards, use_std=use_std, eps=eps),
            )
        )
    return groups


def policy_samples(groups: Sequence[RolloutGroup]) -> list[TrainSample]:
    samples = []
    for group in groups:
        prompt = np.array(group.prompt.token_ids, np.int64)
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            token_ids = np.concatenate([prompt, np.array(rollout.token_ids, np.int64)])
            logprobs = np.zeros(len(token_ids), np.float32)
            logprobs[len(prompt) :] = rollout.logprobs
            samples.append(
                TrainSample(
                    kind="policy",
                    token_ids=token_ids,
                    trained=np.arange(len(token_ids)) >= len(prompt),
                    advantage=advantage,
                    rollout_logprobs=logprobs,
                )
            )
    return samples


def expert_samples(experts: Sequence[Expert]) -> list[TrainSample]:
    return [
        TrainSample(
            kind="expert",
            token_ids=np.array(expert.token_ids, np.int64),
            trained=np.array(expert.trainable, bool),
        )
        for expert in experts
    ]
