"""Measures how noisy the two branches of an update are, and how much they disagree, for GAC (arXiv 2605.26184).

    advantage_variance   variance of the rollouts' advantages
    nll_variance         variance of the demonstrations' mean NLL, without the largest and the smallest of them
    disagreement         mean over all sequences of the mean over a sequence's tokens of (c - A)^2

c is the SFT branch's coefficient of the token, p(1-p) or 1. A is the token's advantage, 0 in a demonstration. These are
the proxies of the authors' code (deepnovacore/GAC, gac/controller.py). Variances divide by n, and every sequence counts
once, whatever its length.

Each rank adds up sums over its tokens. The sums are reduced once over all ranks, together with the loss, so the result
does not depend on how the update is split. The authors' code takes the last two numbers from each rank alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_chord.losses.terms import TermTokens, TokenStats, segment_sums

NUMBER = "number"
"""Name of the constant that numbers the demonstrations of a step, from 0. Rollouts do not have it."""
_FIRST = 5
"""Index of the first demonstration's sums: before it are 5 sums over sequences."""


@dataclass(frozen=True, kw_only=True)
class NoiseMeasurement:
    """What to measure in an update; equal on every rank."""

    demonstrations: int
    """Number of demonstrations of the step. The constant NUMBER is below it."""
    uses_phi: bool
    """True if c is p(1-p); otherwise it is 1."""
    trim: float
    """Share of the demonstrations that `nll_variance` leaves out at each end."""

    @property
    def size(self) -> int:
        """Number of the sums."""
        return _FIRST + 2 * self.demonstrations

    def sums(self, stats: TokenStats, tokens: Mapping[str, TermTokens]) -> Tensor:
        """The sums of one micro-batch on one rank: [size] float64, detached. The caller adds them up over all
        micro-batches, data-parallel and context-parallel ranks.

        Number of rollouts, sums of A and of A^2 over rollouts, number of sequences, sum of their mean (c - A)^2. Then
        for each demonstration its mean NLL, and for each demonstration 1. No collective.
        """
        totals = torch.zeros(self.size, dtype=torch.float64, device=stats.logprobs.device)
        for here in tokens.values():
            if len(here.lengths) == 0:
                continue
            logprobs = stats.logprobs.detach()[here.index].double()
            p = logprobs.exp().clamp(max=1)
            coefficient = p * (1 - p) if self.uses_phi else torch.ones_like(p)
            share = 1 / here.lengths[here.sequence].double()
            is_demonstration = NUMBER in here.columns
            advantage = torch.zeros_like(p) if is_demonstration else here["advantage"].double()
            rows = [share, share * (coefficient - advantage).square()]
            rows += (
                [-share * logprobs] if is_demonstration else [share * advantage, share * advantage.square()]
            )
            of_sequences = segment_sums(torch.stack(rows, dim=1), here.held)
            totals[3:_FIRST] += of_sequences[:, :2].sum(0)
            if is_demonstration:
                held = here.held.clamp(min=1)
                numbers = (segment_sums(here[NUMBER].double(), here.held) / held).round().long()
                totals.index_add_(0, _FIRST + numbers, of_sequences[:, 2])
                totals.index_add_(0, _FIRST + self.demonstrations + numbers, of_sequences[:, 0])
            else:
                totals[:3] += of_sequences[:, [0, 2, 3]].sum(0)
        return totals

    def finish(self, totals: Sequence[float]) -> dict[str, float]:
        """The three numbers, from the sums over all ranks. Empty if the update lacks rollouts or demonstrations."""
        rollouts, advantages, squares, sequences, apart = totals[:_FIRST]
        nlls, present = totals[_FIRST : _FIRST + self.demonstrations], totals[_FIRST + self.demonstrations :]
        nlls = [nll for nll, there in zip(nlls, present, strict=True) if there > 0.5]
        if rollouts < 0.5 or not nlls:
            return {}
        return {
            "advantage_variance": max(squares / rollouts - (advantages / rollouts) ** 2, 0.0),
            "nll_variance": trimmed_variance(nlls, self.trim),
            "disagreement": apart / sequences,
        }


def trimmed_variance(values: Sequence[float], trim: float) -> float:
    """The population variance of ``values`` without the floor(trim x n) smallest and the floor(trim x n) largest.

    Nothing is left out of fewer than 4 values.
    """
    left_out = int(trim * len(values)) if len(values) >= 4 else 0
    return statistics.pvariance(sorted(values)[left_out : len(values) - left_out])
