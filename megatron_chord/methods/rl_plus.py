"""RL-PLUS (arXiv 2508.00222): every group has a demonstration, weighted by a mixture ratio and by (1 - p)^gamma.

    L = -(1/Z) [ sum over demonstrations r_m A_c + sum over rollouts surrogate(r, A) ]
    r_m = 2 p / (p_omega + p_old)      p_omega = (p_old + 1) / 2, so that r_m = 2 p / (1.5 p_old + 0.5)
    A_c = A (1 - p)^gamma

p_omega replaces the unknown probability that the demonstrations' author gave a token. As in the publication's code it
is the mean of the old policy's probability and 1. r_m is differentiated and never clipped. A, p_old and the p in A_c
are constants. A is the advantage over rollouts and demonstration together. Both sums have the same denominator Z, by
``objective.aggregation``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_chord.config import BatchConfig, ResolvedObjective
from megatron_chord.config_methods import RLPlusConfig
from megatron_chord.losses.terms import Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, averaged_term, policy_term
from megatron_chord.methods.demonstration import DEMONSTRATION, collect_mixed
from megatron_chord.methods.groups import POLICY
from megatron_chord.sampling.context import StepContext


@dataclass(frozen=True, kw_only=True)
class RLPlus(Method):
    settings: RLPlusConfig = field(default_factory=RLPlusConfig)

    needs_demonstrations: ClassVar[bool] = True

    def collect(self, context: StepContext) -> Collected:
        return collect_mixed(context)

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return mixture_loss(stats, tokens, gamma=self.settings.gamma, ratio_from=objective.ratio_from)

        scored = {"old_logprob"} if objective.ratio_from == "recomputed" else set[str]()
        demonstration = averaged_term(objective, loss, pool=POLICY, scored=scored)
        return {POLICY: policy_term(objective), DEMONSTRATION: demonstration}


def mixture_loss(stats: TokenStats, tokens: TermTokens, *, gamma: float, ratio_from: str) -> TermOutput:
    """-r_m A_c per demonstration token. Columns: advantage; old_logprob if ``ratio_from`` is `recomputed`.

    With other values of ``ratio_from`` p_old is the policy's probability in this forward pass, because the rollout
    engine has no log-probs of demonstrations.
    """
    p = stats.logprobs.exp()
    p_old = tokens["old_logprob"].exp() if ratio_from == "recomputed" else p.detach()
    ratio = 2 * p / (1.5 * p_old + 0.5)
    focus = (1 - p.detach()).clamp(min=0) ** gamma
    loss = -ratio * focus * tokens["advantage"]
    means = {
        "demonstration_p": p.detach(),
        "demonstration_ratio": ratio.detach(),
        "demonstration_focus": focus,
    }
    return TermOutput(loss, {"demonstration_loss": loss.detach()}, means, {})
