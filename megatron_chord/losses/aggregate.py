"""How a term's loss is averaged: the scale of each token, computed from all samples of the optimizer update.

A pool is a set of terms (often one) that are averaged together. Sequence i (one sample's part) has n_i trained tokens.
N is the sum of all n_i. S is the number of sequences with at least one trained token. The scale of a token is

    token-mean                 1 / N          GRPO as in CHORD's eq. 2, DAPO
    seq-mean-token-mean        1 / (S n_i)    the original GRPO
    seq-mean-token-sum         1 / S
    seq-mean-token-sum-norm    1 / (S C)      Dr.GRPO, C a length in tokens

The names are verl's. Trinity-RFT and verl before 0.8 divide by C alone in the last one, so their loss grows with the
batch. verl 0.8 and ms-swift divide by S C, as this module does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chord.config_methods import Aggregation
from megatron_chord.losses.terms import Term
from megatron_chord.records import Part, TrainSample

SCALE = "scale"
ENTROPY_SCALE = "entropy_scale"
"""Name of the scale of the tokens' entropy, in terms with ``Term.entropy_bonus``."""
MIN_COMPARED_TOKENS = 512
"""Number of tokens that is enough to estimate the mean log-prob difference between trainer and rollout engine
(``train.agreement``)."""


def with_scales(samples: Sequence[TrainSample], terms: Mapping[str, Term]) -> list[TrainSample]:
    """Add the constant ``scale`` to every token of the samples of one optimizer update.

    Tokens of terms with ``Term.entropy_bonus`` also get ``entropy_scale``. These terms together are the pool of their
    entropy.
    """
    num_tokens: Counter[str] = Counter()
    num_sequences: Counter[str] = Counter()
    for part in (part for sample in samples for part in sample.parts if len(part.positions)):
        term = terms[part.term]
        for pool in (term.pool, *((ENTROPY_SCALE,) if term.entropy_bonus else ())):
            num_tokens[pool] += len(part.positions)
            num_sequences[pool] += 1

    def scale(part: Part, pool: str, aggregation: Aggregation) -> float:
        tokens, sequences = num_tokens[pool], num_sequences[pool]
        denominators = {
            "token-mean": tokens,
            "seq-mean-token-mean": sequences * len(part.positions),
            "seq-mean-token-sum": sequences,
            "seq-mean-token-sum-norm": sequences * terms[part.term].aggregation_length,
        }
        return 1.0 / denominators[aggregation]

    def scaled(part: Part) -> Part:
        term = terms[part.term]
        scales = {SCALE: scale(part, term.pool, term.aggregation)}
        if term.entropy_bonus:
            scales[ENTROPY_SCALE] = scale(part, ENTROPY_SCALE, term.entropy_aggregation)
        return replace(part, constants={**part.constants, **scales})

    return [
        replace(sample, parts=tuple(scaled(part) for part in sample.parts if len(part.positions)))
        for sample in samples
    ]


def drop_zero_gradient_parts(
    samples: Sequence[TrainSample], terms: Mapping[str, Term], *, min_tokens: int = MIN_COMPARED_TOKENS
) -> list[TrainSample]:
    """Remove the parts whose loss and gradient are 0 (``Term.zero_gradient_column``), then the samples that have no
    part left. A sample that lost a part ends after its last trained token, because a hidden state depends only on the
    tokens up to its own: a continuation with advantage 0 does not pass through the model, and its prefix does. Tokens
    before a remaining part are its context and stay.

    Trainer and rollout engine are compared on the tokens of every step. So if fewer than ``min_tokens`` tokens of a
    term would remain, some of the removed parts are kept until the term has ``min_tokens`` tokens. The parts kept are
    those with the most tokens relative to the length of their sample. Call this after ``with_scales``: removed parts
    still count in the denominators of the averages.
    """

    def has_zero_gradient(part: Part) -> bool:
        column = terms[part.term].zero_gradient_column
        return column is not None and not np.any(part.constants[column])

    missing = dict.fromkeys(terms, min_tokens)
    removable: list[tuple[float, Part]] = []
    for sample in samples:
        for part in sample.parts:
            if has_zero_gradient(part):
                removable.append((min(len(part.positions), min_tokens) / len(sample.token_ids), part))
            else:
                missing[part.term] -= len(part.positions)
    kept_ids: set[int] = set()
    for _, part in sorted(removable, key=lambda pair: pair[0], reverse=True):
        if missing[part.term] > 0:
            kept_ids.add(id(part))
            missing[part.term] -= len(part.positions)
    kept = [
        (sample, tuple(p for p in sample.parts if id(p) in kept_ids or not has_zero_gradient(p)))
        for sample in samples
    ]
    return [_with_parts(sample, parts) for sample, parts in kept if parts]


def _with_parts(sample: TrainSample, parts: tuple[Part, ...]) -> TrainSample:
    """The sample with these of its parts. If others were removed, it ends after the last token of these."""
    if len(parts) == len(sample.parts):
        return sample
    end = 1 + max(int(part.positions[-1]) for part in parts)
    left_out, teacher = len(sample.token_ids) - end, sample.teacher_ids
    return replace(
        sample,
        token_ids=sample.token_ids[:end],
        parts=parts,
        routes=None if sample.routes is None else sample.routes[:end],
        teacher_ids=None if teacher is None else teacher[: len(teacher) - left_out],
    )
