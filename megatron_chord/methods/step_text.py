"""The data of one step as text, for the printed plan of a run."""

from __future__ import annotations

from megatron_chord.config import BatchConfig
from megatron_chord.methods.base import Method
from megatron_chord.methods.chord import Chord
from megatron_chord.methods.relift import ReLIFT
from megatron_chord.methods.trapo import TRAPO


def step_text(method: Method, batch: BatchConfig) -> str:
    """What a step of ``method`` samples and draws."""
    if isinstance(method, Chord):
        return _text_of_chord(method, batch)
    if isinstance(method, ReLIFT):
        size = method.settings.size
        return f"{_size(batch)}; an SFT update whenever {size} demonstrations of failed prompts are collected"
    if isinstance(method, TRAPO):
        return f"{_rollouts(method, batch)}, in rounds of {', '.join(map(str, method.settings.counts))}"
    return _rollouts(method, batch)


def _text_of_chord(method: Chord, batch: BatchConfig) -> str:
    demonstrations = f"{batch.demonstrations} demonstrations"
    low, high = method.settings.mu.bounds()
    if not method.uses_rollouts(batch):
        return f"{demonstrations}; nothing is sampled"
    rollouts = _rollouts(method, batch)
    if high == 0:
        return f"{rollouts}; no demonstration is drawn"
    only = " (where mu > 0)" if low == 0 else ""
    return f"{rollouts}{' (where mu < 1)' if high == 1 else ''} + {demonstrations}{only}"


def _rollouts(method: Method, batch: BatchConfig) -> str:
    own = ", each with its own demonstration" if method.uses_own_demonstrations else ""
    attempts = batch.sampling_attempts
    more = f", in up to {attempts} rounds of sampling" if attempts > 1 else ""
    return f"{_size(batch)}{own}{more}"


def _size(batch: BatchConfig) -> str:
    return f"{batch.prompts} prompts x {batch.rollouts} rollouts"
