"""What a term's loss is averaged over: the weight of each token, from the whole update's samples.

A pool is one or more terms that are averaged together. With n_i trained tokens in sequence i (one sample's part), N
their sum and S the number of sequences with at least one trained token, a token's scale is

    token_mean      1 / N               GRPO as in CHORD's eq. 2, DAPO
    sequence_mean   1 / (S n_i)         the original GRPO
    sequence_sum    1 / S
    constant        1 / (S C)           Dr.GRPO, C a length in tokens

verl and Trinity-RFT divide `constant` by C alone, so that the loss grows with the batch; ms-swift divides as here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chord.losses.terms import Term
from megatron_chord.records import Part, TrainSample

SCALE = "scale"


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
            "token_mean": tokens,
            "sequence_mean": sequences * len(part.positions),
            "sequence_sum": sequences,
            "constant": sequences * term.aggregation_length,
        }
        return replace(part, constants={**part.constants, SCALE: 1.0 / denominators[term.aggregation]})

    return [
        replace(sample, parts=tuple(scaled(part) for part in sample.parts if len(part.positions)))
        for sample in samples
    ]


def without_idle(samples: Sequence[TrainSample], terms: Mapping[str, Term]) -> list[TrainSample]:
    """The samples without the parts that cannot change anything (``Term.idle``); those without parts are left out.

    Of a term that is idle throughout, the shortest part stays: log-probs are compared in every update. To be called
    after ``with_scales``: what is left out counts in the denominators.
    """

    def is_idle(part: Part) -> bool:
        column = terms[part.term].idle
        return column is not None and not np.any(part.constants[column])

    parts = [part for sample in samples for part in sample.parts]
    busy = {part.term for part in parts if not is_idle(part)}
    shortest: dict[str, Part] = {}
    for part in sorted(parts, key=lambda part: len(part.positions), reverse=True):
        shortest[part.term] = part
    stays = {id(part) for term, part in shortest.items() if term not in busy}
    kept = [
        replace(sample, parts=tuple(p for p in sample.parts if id(p) in stays or not is_idle(p)))
        for sample in samples
    ]
    return [sample for sample in kept if sample.parts]
