"""Finds samples with the same prompt, so that the prompt is packed once for all of them.

A prompt of 350 tokens with 8 answers of 70 is 3,360 tokens when each answer has its own prompt, and 918 tokens when
they share it. Transformer layers compute each hidden state from the tokens before it alone, so the prompt's states are
the same for all answers.

Of a shared prompt all tokens but the last are packed once. Its last token is packed again at the start of each answer,
where it predicts the answer's first token. Every hidden state then predicts at most one trained token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_chord.records import TrainSample


def prompt_tokens(sample: TrainSample) -> int:
    """Number of tokens that may be shared: those before the one that predicts the first trained token."""
    starts = [int(part.positions.min()) for part in sample.parts if len(part.positions)]
    return max(min(starts) - 1, 0) if starts else 0


def prompt_of(sample: TrainSample) -> bytes:
    """The tokens that may be shared, as bytes; equal for samples that can share them."""
    return sample.token_ids[: prompt_tokens(sample)].astype("int64").tobytes()


def groups_by_prompt(samples: Sequence[TrainSample], *, max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of samples that are to be packed together, so that they share their prompt.

    Args:
        max_tokens: a group has at most this many tokens, the prompt counted once. A longer sample is alone.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index, sample in enumerate(samples):
        by_prompt.setdefault(prompt_of(sample) or f"{index}".encode(), []).append(index)
    for members in by_prompt.values():
        group, used = list[int](), 0
        for index in members:
            shared = prompt_tokens(samples[index])
            own = len(samples[index].token_ids) - shared
            if group and used + own > max_tokens:
                yield group
                group, used = [], 0
            used += own if group else shared + own
            group.append(index)
        yield group
