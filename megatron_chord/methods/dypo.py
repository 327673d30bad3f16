"""DYPO (arXiv 2604.08926; code Tocci-Zhu/DYPO, commit 061e581a): the rollouts decide how a prompt is trained.

    all wrong   its demonstration, by SFT; the rollouts are discarded
    all right   not at all
    mixed       its rollouts, by RL and by the group alignment loss (GAL)

A rollout is right if its reward is above ``positive_reward``. A step trains n_SFT prompts of the first kind and n_RL of
the last:

    L = n_RL / (n_RL + n_SFT) (L_RL + alignment_coefficient GAL)  +  sft_coefficient n_SFT / (n_RL + n_SFT) L_SFT
    GAL = mean over mixed groups of mean over (right, wrong) pairs of -log sigma(beta (S_right - S_wrong))

S is the sum of an answer's log-probs, with ``reference: true`` minus that of the reference policy. It is computed over
all ranks before the update, so GAL's gradient is exact however a group is split (``losses.preference``).

As in the authors' code: GAL and its coefficients 0.001 and 0.1, and no reference. Differences: the code collects hard
and mixed prompts in two queues, each with updates of its own and a learning rate of its own (SFT 5e-6, RL 5e-7); here
one update has both. The paper trains a hard prompt on answers of several teachers; here it has one demonstration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from megatron_chord.config import BatchConfig, ObjectiveConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import DYPOConfig, SimpleWeight
from megatron_chord.losses.aggregate import SCALE
from megatron_chord.losses.policy import policy_loss
from megatron_chord.losses.preference import alignment_columns
from megatron_chord.losses.sft import sft_term
from megatron_chord.losses.terms import AcrossRanks, Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import (
    Collected,
    Method,
    policy_term,
    refuse_dynamic_sampling,
    refuse_several_updates,
)
from megatron_chord.methods.chord import SFT
from megatron_chord.methods.groups import (
    POLICY,
    answer_sample,
    reward_stats,
    rollout_is_trained,
    rollout_sample,
    whole_groups,
    with_advantages,
)
from megatron_chord.records import RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext


@dataclass(frozen=True, kw_only=True)
class DYPO(Method):
    settings: DYPOConfig = field(default_factory=DYPOConfig)

    needs_demonstrations: ClassVar[bool] = True

    def check(self, run: RunConfig) -> None:
        refuse_several_updates(run.batch, self.name, also="a group must be whole")
        refuse_dynamic_sampling(run.batch, "method dypo trains these by SFT")

    def collect(self, context: StepContext) -> Collected:
        batch, objective = context.batch, context.objective
        graded = [answers for _, answers in context.groups(batch.prompts, num_rollouts=batch.rollouts)]
        groups = [group for _, group in whole_groups(graded, step=context.now.step)]
        num_right = [sum(self.is_right(group)) for group in groups]
        hard = [group for group, right in zip(groups, num_right, strict=True) if right == 0]
        mixed = [
            group for group, right in zip(groups, num_right, strict=True) if 0 < right < len(group.rewards)
        ]
        samples = [
            sample
            for index, group in enumerate(with_advantages(mixed, objective))
            for sample in self.group_samples(group, index, objective)
        ]
        samples += [
            answer_sample(group.prompt, context.demonstration(group.prompt), term=SFT) for group in hard
        ]
        return Collected(
            samples=samples,
            weights=self.weights(num_hard=len(hard), num_mixed=len(mixed)),
            stats={
                **reward_stats(groups, num_sampled=len(graded)),
                "sft_prompts": len(hard) / len(groups),
                "skipped_prompts": 1 - (len(hard) + len(mixed)) / len(groups),
            },
        )

    def is_right(self, group: RolloutGroup) -> list[bool]:
        return [reward > self.settings.positive_reward for reward in group.rewards]

    def group_samples(self, group: RolloutGroup, index: int, objective: ObjectiveConfig) -> list[TrainSample]:
        """The rollouts of mixed group ``index``, under the term ``policy``."""
        return [
            rollout_sample(
                group.prompt,
                rollout,
                advantage=advantage,
                group=float(index),
                member=float(member),
                sign=1.0 if is_right else -1.0,
            )
            for member, (rollout, advantage, is_right) in enumerate(
                zip(group.rollouts, group.advantages, self.is_right(group), strict=True)
            )
            if rollout_is_trained(rollout, objective)
        ]

    def weights(self, *, num_hard: int, num_mixed: int) -> dict[str, float]:
        """The weights of the two terms."""
        share = num_hard / max(num_hard + num_mixed, 1)
        return {POLICY: 1 - share, SFT: self.settings.sft_coefficient * share}

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        settings, base = self.settings, policy_term(objective)

        def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return dypo_loss(stats, tokens, objective, coefficient=settings.alignment_coefficient)

        def prepare(batches: Sequence[TermTokens], across: AcrossRanks) -> list[Mapping[str, Tensor]]:
            return alignment_columns(
                batches,
                across,
                beta=settings.beta,
                max_groups=batch.prompts,
                max_members=batch.rollouts,
                with_reference=settings.reference,
            )

        scored = {"old_logprob", "reference_logprob"} if settings.reference else {"old_logprob"}
        return {
            POLICY: replace(
                base, loss=loss, scored=base.scored | scored, prepare=prepare, zero_gradient_column=None
            ),
            SFT: sft_term(weight=SimpleWeight(kind="one"), temperature=settings.sft_temperature),
        }


def dypo_loss(
    stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig, *, coefficient: float
) -> TermOutput:
    """Policy loss + coefficient x GAL, per token of a rollout.

    Columns: those of ``policy_loss`` and of ``losses.preference.alignment_columns``; scale. GAL is a mean over groups
    and pairs and not over tokens. So it is divided by the token's scale, which multiplies the whole loss later.
    """
    rl = policy_loss(stats, tokens, objective)
    logprobs, scale = stats.logprobs, tokens[SCALE]
    change = logprobs - logprobs.detach()
    alignment = (tokens["alignment_share"] + tokens["alignment_slope"] * change) / scale
    losses = {
        **rl.losses,
        "alignment_loss": alignment.detach(),
        "alignment_accuracy": tokens["alignment_accuracy_share"] / scale,
    }
    return TermOutput(rl.loss + coefficient * alignment, losses, rl.means, rl.maxima)
