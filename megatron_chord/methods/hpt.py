"""HPT (arXiv 2509.04419; code TsinghuaC3I/Unify-Post-Training): each prompt is trained by RL or by SFT.

P is the mean score of the prompt's rollouts. If P <= ``gate``, the rollouts are discarded and the prompt's
demonstration is trained by SFT. Otherwise the rollouts are trained by GRPO. A step has n prompts, n_SFT of them trained
by SFT and n_RL by GRPO:

    L = (n_RL / n) L_RL  +  sft_coefficient (n_SFT / n) L_SFT

``objective.aggregation`` averages L_RL over the tokens trained by RL and L_SFT over the demonstrations' tokens.

The paper defines alpha L_RL + beta L_SFT for one prompt, with (alpha, beta) = (0, 1) or (1, 0). There L_RL is clipped
Dr.GRPO with the advantage divided by the std, and L_SFT is a mean over tokens. The paper does not define how the
prompts of a batch are averaged; with the weights above each branch counts by its share of the prompts. The authors'
script uses neither std nor clip. It divides the sum of L_RL over tokens by 8192 and averages L_SFT over the tokens of a
micro-batch. So its two branches have different scales, and the scale of L_SFT depends on the packing. With
``branch_weights: equal`` the weights are 1 and ``sft_coefficient``. With token means, a coefficient of 8192 / (tokens
of a micro-batch) gives the script's scale (docs/methods.md, note 20).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_chord.config import BatchConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import HPTConfig, SimpleWeight
from megatron_chord.losses.sft import sft_term
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, Method, policy_term, refuse_dynamic_sampling
from megatron_chord.methods.chord import SFT
from megatron_chord.methods.groups import (
    POLICY,
    answer_sample,
    policy_samples,
    reward_stats,
    whole_groups,
    with_advantages,
)
from megatron_chord.records import GradedRollouts
from megatron_chord.sampling.context import StepContext


@dataclass(frozen=True, kw_only=True)
class HPT(Method):
    settings: HPTConfig = field(default_factory=HPTConfig)

    needs_demonstrations: ClassVar[bool] = True

    def check(self, run: RunConfig) -> None:
        refuse_dynamic_sampling(run.batch, "method hpt trains these by SFT")

    def collect(self, context: StepContext) -> Collected:
        batch, objective = context.batch, context.objective
        graded = [answers for _, answers in context.groups(batch.prompts, num_rollouts=batch.rollouts)]
        pairs = whole_groups(graded, step=context.now.step)
        groups = with_advantages([group for _, group in pairs], objective)
        imitates = [mean_score(item) <= self.settings.gate for item, _ in pairs]
        explored = [group for group, sft in zip(groups, imitates, strict=True) if not sft]
        imitated = [group.prompt for group, sft in zip(groups, imitates, strict=True) if sft]
        samples = policy_samples(explored, objective)
        samples += [answer_sample(prompt, context.demonstration(prompt), term=SFT) for prompt in imitated]
        return Collected(
            samples=samples,
            weights=self.weights(imitates),
            stats={
                **reward_stats(groups, num_sampled=len(graded)),
                "sft_prompts": statistics.fmean(imitates),
            },
        )

    def weights(self, imitates: Sequence[bool]) -> dict[str, float]:
        """The weights of the two terms. ``imitates`` says for each prompt whether it is trained by SFT."""
        if self.settings.branch_weights == "equal":
            return {POLICY: 1.0, SFT: self.settings.sft_coefficient}
        share = statistics.fmean(imitates)
        return {POLICY: 1 - share, SFT: self.settings.sft_coefficient * share}

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        demonstration = sft_term(weight=SimpleWeight(kind="one"), temperature=self.settings.sft_temperature)
        return {POLICY: policy_term(objective), SFT: demonstration}


def mean_score(graded: GradedRollouts) -> float:
    """P: the mean grader score of the rollouts whose grading succeeded, without penalties for form and length."""
    return statistics.fmean(grade.score for grade in graded.grades if grade.score is not None)
