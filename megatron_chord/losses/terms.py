"""Terms of the objective: what a loss over trained tokens is given, and what it gives back.

The objective of every method is a sum over terms; a term is a loss per token, times the token's ``scale`` (one over
what its pool is averaged over, ``losses.aggregate``), summed, times the term's weight in the step. All of a term's
constants are known before the pass, so the sum over any split of the step is the same number, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.config_methods import Aggregation


class TokenStats(NamedTuple):
    """What the pass computed of K tokens."""

    logprobs: Tensor
    """[K], differentiable"""
    entropy: Tensor
    """[K], of the full vocabulary, differentiable"""
    rival: Tensor | None
    """[K], log-prob of the best other token, detached; only where a term asks for it"""
    logit: Tensor | None = None
    """[K], the tokens' own logits, divided by the temperature, detached; none where only log-probs are known"""

    def at(self, index: Tensor) -> TokenStats:
        """Of the tokens at ``index``."""
        rival = None if self.rival is None else self.rival[index]
        logit = None if self.logit is None else self.logit[index]
        return TokenStats(self.logprobs[index], self.entropy[index], rival, logit)


@dataclass(frozen=True, kw_only=True)
class TermTokens:
    """What is known beforehand of the K tokens of one term in one micro-batch (on one context-parallel rank)."""

    index: Tensor
    """[K] int64: which of the micro-batch's trained tokens"""
    sequence: Tensor
    """[K] int64: the sequence of each"""
    lengths: Tensor
    """[S] float32: tokens of each sequence on all context-parallel ranks together"""
    held: Tensor
    """[S] int64: tokens of each sequence that are here; they lie together, in the sequences' order"""
    columns: Mapping[str, Tensor]
    """[K] float32 each"""
    context: dist.ProcessGroup | None = None
    """The ranks that hold the sequences' other tokens, if any."""

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Each token's sequence's sum of ``values`` [K], a constant [K]. One all-reduce over the context ranks.

        Segments are added up in order, not by atomics, so every tensor-parallel rank gets the same bits.
        """
        if len(self.lengths) == 0:
            return values.detach()
        sums = segment_sums(values.detach(), self.held)
        if self.context is not None:
            dist.all_reduce(sums, group=self.context)
        return sums[self.sequence]

    def sequence_means(self, values: Tensor) -> Tensor:
        """Like ``sequence_sums``, divided by the sequence's length."""
        return self.sequence_sums(values) / self.lengths[self.sequence]


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[S, ...]: sums of the S segments of ``lengths`` [S] that ``values`` [K, ...] consists of; S > 0.

    Each is added up in order, and without a look at the lengths: torch's own checks of them would wait for the device.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


class TermOutput(NamedTuple):
    """Of K tokens. Metrics are detached; their names are unique over the terms of a method."""

    loss: Tensor
    """[K], what is minimised, before scale and weight"""
    losses: Mapping[str, Tensor]
    """[K] each: reported summed with the tokens' scale, as the loss is"""
    means: Mapping[str, Tensor]
    """[K] each: reported as the mean over the term's tokens"""
    maxima: Mapping[str, Tensor]
    """[K] each, >= 0: reported as the largest"""


TermLoss = Callable[[TokenStats, TermTokens], TermOutput]


class AcrossRanks(Protocol):
    """Reductions over the ranks that hold the update's other tokens."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all ranks; every rank has the same shape."""
        ...

    def collect(self, values: Tensor) -> Tensor:
        """All ranks' [n] values end to end; n may differ."""
        ...


Prepare = Callable[[Sequence[TermTokens], AcrossRanks], Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a method's objective."""

    loss: TermLoss
    pool: str
    """Terms of one pool are averaged together (``losses.aggregate``)."""
    aggregation: Aggregation = "token-mean"
    aggregation_length: int = 1
    """For `seq-mean-token-sum-norm`."""
    scored: frozenset[str] = field(default=frozenset())
    """Columns that a forward pass before the step's first update fills: old_logprob, old_entropy (of the policy),
    reference_logprob (of the reference)."""
    prepare: Prepare | None = None
    """Further columns from the scored ones, with all of the update's tokens at hand: from each micro-batch's tokens
    to each micro-batch's new columns. Called on every rank that computes losses."""
    temperature: float | None = None
    """What its tokens' logits are divided by; none: as in sampling."""
    rival: bool = False
    """The loss uses ``TokenStats.rival``."""
    idle: str | None = None
    """A column: sequences in which it is 0 throughout have neither loss nor gradient, so they need no pass."""


def num_forward_passes(terms: Iterable[Term]) -> int:
    """Before a step's first update: one of the policy, one of the reference, each where a term asks for its columns."""
    scored = {column for term in terms for column in term.scored}
    return bool(scored & {"old_logprob", "old_entropy"}) + ("reference_logprob" in scored)


def reported(term: Term) -> TermOutput:
    """The term's output for no tokens: its keys are the names of all it reports. No collective."""
    nothing = torch.zeros(0)
    tokens = TermTokens(
        index=nothing.long(),
        sequence=nothing.long(),
        lengths=nothing,
        held=nothing.long(),
        columns=_Empty(nothing),
    )
    return term.loss(TokenStats(nothing, nothing, nothing, nothing), tokens)


class _Empty(Mapping[str, Tensor]):
    """Every column there could be, without a token in it."""

    def __init__(self, nothing: Tensor) -> None:
        self._nothing = nothing

    def __getitem__(self, name: str) -> Tensor:
        return self._nothing

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
