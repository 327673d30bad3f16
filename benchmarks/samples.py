"""Random samples of CHORD's two terms, to train on in benchmarks."""

from __future__ import annotations

import numpy as np

from megatron_chord.records import Part, TrainSample

SPREAD = 0.1
"""The standard deviation of the rollouts' log-probs around those of a model that knows nothing."""


def make_samples(
    *, rollouts: int, demonstrations: int, vocab: int, group: int = 1, tails: bool = False
) -> list[TrainSample]:
    """Samples with lengths like those of GSM8K, in a random order that is always the same.

    Args:
        group: number of rollouts that share a prompt.
        tails: long-tailed lengths of responses, with a mean of 500 and a maximum of 2000.
    """
    rng = np.random.default_rng(0)
    samples, prompt_ids = [], np.empty(0, np.int64)
    for index in range(rollouts + demonstrations):
        is_demonstration = index >= rollouts
        if is_demonstration or index % group == 0:
            length = int(np.clip(rng.lognormal(np.log(90), 0.35), 30, 400))
            prompt_ids = rng.integers(3, vocab, length)
        median, spread, most = (400, 0.75, 2000) if tails else (160, 0.5, 1000)
        response = int(np.clip(rng.lognormal(np.log(median), spread), 8, most))
        samples.append(make_sample(rng, prompt_ids, response, vocab=vocab, is_demonstration=is_demonstration))
    order = rng.permutation(len(samples))
    return [samples[i] for i in order]


def fill_tokens(tokens: int, *, longest: int, mean: int, vocab: int) -> list[TrainSample]:
    """As many samples as have ``tokens`` tokens together, or a few more. Every eighth one is a demonstration.

    Args:
        longest: tokens of the longest sample.
        mean: mean length of the responses, which is exponentially distributed.
    """
    rng = np.random.default_rng(0)
    samples: list[TrainSample] = []
    prompt = min(128, longest // 4)
    while sum(len(sample.token_ids) for sample in samples) < tokens:
        response = int(np.clip(rng.exponential(mean), 8, longest - prompt))
        prompt_ids = rng.integers(3, vocab, prompt)
        is_demonstration = len(samples) % 8 == 0
        samples.append(make_sample(rng, prompt_ids, response, vocab=vocab, is_demonstration=is_demonstration))
    return samples


def make_sample(
    rng: np.random.Generator, prompt_ids: np.ndarray, response: int, *, vocab: int, is_demonstration: bool
) -> TrainSample:
    """One sample: the prompt with a random response of the given length."""
    prompt = len(prompt_ids)
    constants = {
        "advantage": float(rng.normal()),
        "rollout_logprob": rng.normal(-np.log(vocab), SPREAD, response).astype(np.float32),
    }
    part = Part(
        term="sft" if is_demonstration else "policy",
        positions=np.arange(prompt, prompt + response),
        constants={} if is_demonstration else constants,
    )
    token_ids = np.concatenate([prompt_ids, rng.integers(3, vocab, response)])
    return TrainSample(token_ids=token_ids, parts=(part,))
