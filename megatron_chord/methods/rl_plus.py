"""RL-PLUS (arXiv 2508.00222): a demonstration in every group, weighted by a mixture ratio and by what is unlearned.

    L = -(1/Z) [ sum over demonstrations r_m A_c + sum over rollouts surrogate(r, A) ]
    r_m = 2 p / (p_omega + p_old)      p_omega = (p_old + 1) / 2, so that r_m = 2 p / (1.5 p_old + 0.5)
    A_c = A (1 - p)^gamma

p_omega stands for the demonstrations' unknown policy: the mean of the old policy and one that is 1 everywhere, as the
publication's code has it. r_m is differentiated and never clipped; A, p_old and the p of A_c are constants.
A is over rollouts and demonstration together. Z is one denominator for both, by ``objective.aggregation``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_chord.config import RunConfig
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

    def collect(self, context: StepContext, run: RunConfig) -> Collected:
        return collect_mixed(context, run)

    def terms(self, run: RunConfig) -> dict[str, Term]:
        def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return mixture_loss(stats, tokens, gamma=self.settings.gamma, ratio_from=run.objective.ratio_from)

        scored = {"old_logprob"} if run.objective.ratio_from == "recomputed" else set[str]()
        demonstration = averaged_term(run, loss, pool=POLICY, scored=scored)
        return {POLICY: policy_term(run), DEMONSTRATION: demonstration}


def mixture_loss(stats: TokenStats, tokens: TermTokens, *, gamma: float, ratio_from: str) -> TermOutput:
    """-r_m A_c per demonstration token; columns advantage, and old_logprob with ``ratio_from: recomputed``.

    Otherwise p_old is the policy's own probability of this pass: no rollout engine has scored a demonstration.
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
