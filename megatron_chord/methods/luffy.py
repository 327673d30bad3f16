"""LUFFY (arXiv 2504.14945): every group has a demonstration; a shaped ratio makes its rare tokens learnable.

    L = -(1/Z) [ sum over demonstrations f(p) A + sum over rollouts surrogate(r, A) ]    f(x) = x / (x + gamma)

The probability that the demonstrations' author gave each token is assumed to be 1. So the ratio of a demonstration
token is p, the policy's probability; it is not clipped. A is the advantage over rollouts and demonstration together,
and it is a constant. f is differentiated: the gradient with respect to the token's logit is A gamma p(1-p) / (p +
gamma)^2, which is largest at p = gamma / (1 + 2 gamma). Both sums have the same denominator Z, by
``objective.aggregation``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_chord.config import BatchConfig, ResolvedObjective
from megatron_chord.config_methods import LuffyConfig
from megatron_chord.losses.terms import Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, averaged_term, policy_term
from megatron_chord.methods.demonstration import DEMONSTRATION, collect_mixed
from megatron_chord.methods.groups import POLICY
from megatron_chord.sampling.context import StepContext


@dataclass(frozen=True, kw_only=True)
class Luffy(Method):
    settings: LuffyConfig = field(default_factory=LuffyConfig)

    needs_demonstrations: ClassVar[bool] = True

    def collect(self, context: StepContext) -> Collected:
        return collect_mixed(context)

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return shaped_loss(stats, tokens, gamma=self.settings.gamma if self.settings.shaping else None)

        return {POLICY: policy_term(objective), DEMONSTRATION: averaged_term(objective, loss, pool=POLICY)}


def shaped_loss(stats: TokenStats, tokens: TermTokens, *, gamma: float | None) -> TermOutput:
    """-f(p) A per demonstration token. Column: advantage.

    If ``gamma`` is None, f(x) = x; with A = 1 this has the gradient of DFT.
    """
    p = stats.logprobs.exp()
    ratio = p if gamma is None else p / (p + gamma)
    loss = -ratio * tokens["advantage"]
    means = {"demonstration_p": p.detach(), "demonstration_ratio": ratio.detach()}
    return TermOutput(loss, {"demonstration_loss": loss.detach()}, means, {})
