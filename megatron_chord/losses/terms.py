"""Terms of the objective: the inputs and outputs of a loss over trained tokens.

The objective of every method is a sum over terms. A term is its weight in the step, times the sum over tokens of the
token's ``scale`` times its loss. The scale is 1 / the denominator of the average over the token's pool
(``losses.aggregate``). All constants of a term are known before the forward pass. So the loss and its gradient do not
depend on how the update is split into micro-batches and ranks.
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
    """The results of the forward pass for K tokens."""

    logprobs: Tensor
    """[K], differentiable"""
    entropy: Tensor
    """[K], of the distribution over the full vocabulary, differentiable"""
    rival: Tensor | None
    """[K], log-prob of the best token other than the target, detached; None unless a term needs it (``Term.rival``)"""
    logit: Tensor | None = None
    """[K], the targets' logits divided by the temperature, detached; None if only log-probs are known"""

    def at(self, index: Tensor) -> TokenStats:
        """The results for the tokens at ``index``."""
        rival = None if self.rival is None else self.rival[index]
        logit = None if self.logit is None else self.logit[index]
        return TokenStats(self.logprobs[index], self.entropy[index], rival, logit)


@dataclass(frozen=True, kw_only=True)
class TermTokens:
    """The constants of the K tokens of one term in one micro-batch on one context-parallel rank.

    They are known before the forward pass.
    """

    index: Tensor
    """[K] int64: index of each token among the micro-batch's trained tokens"""
    sequence: Tensor
    """[K] int64: index of the sequence to which each token belongs"""
    lengths: Tensor
    """[S] float32: number of tokens of each sequence, over all context-parallel ranks"""
    held: Tensor
    """[S] int64: number of tokens of each sequence on this rank. A sequence's tokens are contiguous, in the order of
    the sequences."""
    columns: Mapping[str, Tensor]
    """Constants of the tokens, by name: [K] float32 each, one constant for each token"""
    context: dist.ProcessGroup | None = None
    """The context-parallel ranks, which hold the other tokens of the sequences; None without context parallelism."""

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def sequence_sums(self, values: Tensor) -> Tensor:
        """For each token the sum of ``values`` [K] over its sequence: [K], without a gradient.

        The sums are computed in order and not by atomics, so every tensor-parallel rank gets the same bits.
        Collectives: one all-reduce over the context-parallel ranks.
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
    """The sums of S contiguous segments of ``values`` [K, ...]: [S, ...]. ``lengths`` [S] is their lengths; S > 0.

    Each segment is summed in order. torch's check of the lengths is switched off, because it would wait for the device.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)


class TermOutput(NamedTuple):
    """Loss and metrics of K tokens. Metrics are detached. A metric's name is unique over the terms of a method."""

    loss: Tensor
    """[K], the loss of each token, before its scale and the term's weight are applied"""
    losses: Mapping[str, Tensor]
    """Metrics, [K] each: reported as the sum of scale x value, like the loss"""
    means: Mapping[str, Tensor]
    """Metrics, [K] each: reported as the mean over the term's tokens"""
    maxima: Mapping[str, Tensor]
    """Metrics, [K] each, >= 0: reported as the maximum over the term's tokens"""


TermLoss = Callable[[TokenStats, TermTokens], TermOutput]


class AcrossRanks(Protocol):
    """Reductions over all ranks that hold tokens of the update."""

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks. ``values`` has the same shape on every rank."""
        ...

    def collect(self, values: Tensor) -> Tensor:
        """The concatenation of all ranks' ``values`` [n]. n may differ between ranks."""
        ...


Prepare = Callable[[Sequence[TermTokens], AcrossRanks], Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a method's objective."""

    loss: TermLoss
    pool: str
    """Name of the term's pool. All terms of one pool are averaged together (``losses.aggregate``)."""
    aggregation: Aggregation = "token-mean"
    aggregation_length: int = 1
    """The length C of `seq-mean-token-sum-norm`, in tokens."""
    scored: frozenset[str] = field(default=frozenset())
    """Columns that need a forward pass before the step's first update; ``PASSES`` lists them."""
    prepare: Prepare | None = None
    """Computes further columns from the scored ones, before the update. It is called on every rank that computes
    losses, with the tokens of each of the rank's micro-batches, and returns the new columns of each micro-batch."""
    temperature: float | None = None
    """The logits of the term's tokens are divided by it; None means the sampling temperature."""
    rival: bool = False
    """True if the loss uses ``TokenStats.rival``."""
    entropy_bonus: float = 0.0
    """Coefficient of an entropy that is averaged apart from the loss: over the tokens of all terms that have such a
    coefficient. It is subtracted from the objective without the term's weight."""
    entropy_aggregation: Aggregation = "token-mean"
    """How that entropy is averaged."""
    zero_gradient_column: str | None = None
    """Name of a column, or None. A sequence in which this column is 0 everywhere has loss 0 and gradient 0, so it needs
    no forward pass."""


TEACHER_COLUMNS = {
    "present": "teacher_logprob",
    "initial": "reference_teacher_logprob",
    "averaged": "averaged_teacher_logprob",
}
"""The scored column of each teacher: log-probs of the same answer after the teacher's prompt."""
PASSES: tuple[frozenset[str], ...] = (
    frozenset({"old_logprob", "old_entropy"}),
    frozenset({"reference_logprob"}),
    *(frozenset({column}) for column in TEACHER_COLUMNS.values()),
)
"""The columns of each forward pass before a step's first update. The passes are: the policy on the samples; the
reference model on the samples; the policy on the samples after their teachers' prompts; the reference model on these;
the policy with averaged weights on these. A token without a teacher has 0 in the last three."""


def num_forward_passes(terms: Iterable[Term]) -> int:
    """Number of forward passes before a step's first update: one for each of ``PASSES`` of which a term has a
    column."""
    scored = {column for term in terms for column in term.scored}
    return sum(bool(scored & columns) for columns in PASSES)


def need_reference(terms: Iterable[Term]) -> bool:
    """True if a term has a column that the reference model computes."""
    return any({"reference_logprob", TEACHER_COLUMNS["initial"]} & term.scored for term in terms)


def empty_output(term: Term) -> TermOutput:
    """The term's output for zero tokens. Its keys are the names of the term's metrics. No collective."""
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
    """A mapping that returns an empty column for every name."""

    def __init__(self, nothing: Tensor) -> None:
        self._nothing = nothing

    def __getitem__(self, name: str) -> Tensor:
        return self._nothing

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
