"""What a term's loss is averaged over: the weight of each token, from the whole update's samples.

A pool is one or more terms that are averaged together. With n_i trained tokens in sequence i (one sample's part), N
their sum and S the number of sequences with at least one trained token, a token's scale is

    token-mean                 1 / N          GRPO as in CHORD's eq. 2, DAPO
    seq-mean-token-mean        1 / (S n_i)    the original GRPO
    seq-mean-token-sum         1 / S
    seq-mean-token-sum-norm    1 / (S C)      Dr.GRPO, C a length in tokens

The names are verl's. Trinity-RFT, and verl before 0.9, divide the last one by C alone, so that their loss grows with
the batch. verl 0.9 and ms-swift divide as here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chord.losses.terms import Term
from megatron_chord.records import Part, TrainSample

SCALE = "scale"
ENOUGH_TOKENS = 512
"""On so many tokens the mean difference of trainer and rollout engine is known well enough (``train.agreement``)."""


def with_scales(samples: Sequence[TrainSample], terms: Mapping[str, Term]) -> list[TrainSample]:
    """The samples of one optimizer update with the constant ``scale`` at every token."""
    num_tokens: Counter[str] = Counter()
    num_sequences: Counter[str] = Counter()
    for part in (part for sample in samples for part in sample.parts if len(part.positions)):
        num_tokens[terms[part.term].pool] += len(part.positions)
        num_sequences[terms[part.term].pool] += 1

    def scaled(part: Part) -> Part:
        term = terms[part.term]
        tokens, sequences = num_tokens[term.pool], num_sequences[term.pool]
        denominators = {
            "token-mean": tokens,
            "seq-mean-token-mean": sequences * len(part.positions),
            "seq-mean-token-sum": sequences,
            "seq-mean-token-sum-norm": sequences * term.aggregation_length,
        }
        return replace(part, constants={**part.constants, SCALE: 1.0 / denominators[term.aggregation]})

    return [
        replace(sample, parts=tuple(scaled(part) for part in sample.parts if len(part.positions)))
        for sample in samples
    ]


def without_idle(
    samples: Sequence[TrainSample], terms: Mapping[str, Term], *, enough: int = ENOUGH_TOKENS
) -> list[TrainSample]:
    """The samples without the parts that cannot change anything (``Term.idle``); those without parts are left out.

    Where fewer than ``enough`` tokens of a term are left, idle parts stay until there are as many: trainer and rollout
    engine are compared on these tokens in every step. Those stay that bring the most tokens for what they cost. To be
    called after ``with_scales``: what is left out counts in the denominators.
    """

    def is_idle(part: Part) -> bool:
        column = terms[part.term].idle
        return column is not None and not np.any(part.constants[column])

    missing = dict.fromkeys(terms, enough)
    idle: list[tuple[float, Part]] = []
    for sample in samples:
        for part in sample.parts:
            if is_idle(part):
                idle.append((min(len(part.positions), enough) / len(sample.token_ids), part))
            else:
                missing[part.term] -= len(part.positions)
    stays: set[int] = set()
    for _, part in sorted(idle, key=lambda pair: pair[0], reverse=True):
        if missing[part.term] > 0:
            stays.add(id(part))
            missing[part.term] -= len(part.positions)
    kept = [
        replace(sample, parts=tuple(p for p in sample.parts if id(p) in stays or not is_idle(p)))
        for sample in samples
    ]
    return [sample for sample in kept if sample.parts]
