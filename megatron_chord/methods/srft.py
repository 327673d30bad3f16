"""SRFT (arXiv 2506.19767): SFT and RL in one step, each weighted by the policy's entropy.

    L = E_demonstrations[ -w_sft log p - p A ] + E_rollouts[ -w_rl log p if the answer is right, log p if it is wrong ]
    w_sft = sft_coefficient exp(-H)      w_rl = rl_coefficient exp(H)      H = mean token entropy of the sequence

Both w are constants. A is a constant too: the demonstration's advantage over rollouts and demonstration together. Only
the sign of a rollout's reward matters. Nothing is clipped, and rollouts have no importance ratio.

The publication does not say over what its expectations are averaged, nor which H it means. Here each expectation is a
mean by ``objective.aggregation`` (right and wrong rollouts are one mean), and H is that of the sequence. The only
published code, which is not the authors', uses the H of the sequence too. It also divides the rollouts' sum by a
constant length and applies LUFFY's shaping to p A. Neither is in the publication, and neither is done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from megatron_chord.config import BatchConfig, ObjectiveConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import SRFTConfig
from megatron_chord.losses.policy import logprob_gap_stats
from megatron_chord.losses.terms import Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, averaged_term
from megatron_chord.methods.demonstration import (
    DEMONSTRATION,
    GuidedGroup,
    demonstration_samples,
    sample_guided,
    trained_groups,
)
from megatron_chord.methods.groups import POLICY, rollout_is_trained, rollout_sample
from megatron_chord.records import TrainSample
from megatron_chord.sampling.context import StepContext

UNUSED = (
    "surrogate",
    "clip_low",
    "clip_high",
    "dual_clip",
    "ratio_from",
    "kl",
    "correction",
)


@dataclass(frozen=True, kw_only=True)
class SRFT(Method):
    settings: SRFTConfig = field(default_factory=SRFTConfig)

    needs_demonstrations: ClassVar[bool] = True

    def check(self, run: RunConfig) -> None:
        if run.rollout.asynchronous is not None:
            raise ValueError(
                "rollout.asynchronous: method srft has no importance ratio, so nothing corrects for rollouts that "
                "older weights sampled; leave it out"
            )
        if run.rollout.carries:
            raise ValueError(
                "rollout.partial with unfinished: carry: method srft has no importance ratio, so nothing corrects for "
                "the carried tokens that older weights sampled; leave rollout.partial out, or set unfinished: drop"
            )
        default = ObjectiveConfig()
        for name in UNUSED:
            if getattr(run.objective, name) != getattr(default, name):
                raise ValueError(
                    f"objective.{name}: method srft trains rollouts by the sign of their reward and has no ratio and "
                    "no penalty; leave it out"
                )
        if run.objective.entropy_bonus and run.objective.entropy_bonus_on != "all":
            raise ValueError(
                "objective.entropy_bonus: method srft averages it also over the tokens of demonstrations; set "
                "objective.entropy_bonus_on: all"
            )

    def collect(self, context: StepContext) -> Collected:
        guided = sample_guided(context)
        trained = trained_groups(guided.groups, context.objective)
        own = signed_samples(trained, context.objective, positive_reward=self.settings.positive_reward)
        return Collected(
            samples=own + demonstration_samples(trained),
            weights={POLICY: 1.0, DEMONSTRATION: 1.0},
            stats=guided.stats,
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        def of_rollouts(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return signed_loss(stats, tokens, coefficient=self.settings.rl_coefficient)

        def of_demonstrations(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return imitation_loss(stats, tokens, coefficient=self.settings.sft_coefficient)

        return {
            POLICY: averaged_term(objective, of_rollouts, pool=POLICY),
            DEMONSTRATION: averaged_term(objective, of_demonstrations, pool=DEMONSTRATION),
        }


def signed_samples(
    groups: Sequence[GuidedGroup], objective: ObjectiveConfig, *, positive_reward: float
) -> list[TrainSample]:
    """A sample for each trained rollout. The constant ``sign`` is 1 if the reward is above ``positive_reward``, else
    -1.
    """
    return [
        rollout_sample(own.prompt, rollout, sign=1.0 if reward > positive_reward else -1.0)
        for own in (group.own for group in groups)
        for rollout, reward in zip(own.rollouts, own.rewards, strict=True)
        if rollout_is_trained(rollout, objective)
    ]


def signed_loss(stats: TokenStats, tokens: TermTokens, *, coefficient: float) -> TermOutput:
    """-w_rl log p for tokens of right rollouts, log p for tokens of wrong ones. Columns: sign, rollout_logprob.

    Collectives: one all-reduce over the context-parallel ranks.
    """
    logprobs, is_right = stats.logprobs, tokens["sign"] > 0
    weight = coefficient * tokens.sequence_means(stats.entropy).exp()
    loss = torch.where(is_right, -weight, 1.0) * logprobs
    apart = logprob_gap_stats(logprobs, tokens["rollout_logprob"])
    means = {
        "entropy": stats.entropy.detach(),
        **apart,
        "right_fraction": is_right.float(),
        "right_weight": weight,
    }
    return TermOutput(
        loss,
        {"policy_loss": loss.detach()},
        means,
        {"logprob_gap_max": apart["logprob_gap"]},
    )


def imitation_loss(stats: TokenStats, tokens: TermTokens, *, coefficient: float) -> TermOutput:
    """-w_sft log p - p A per demonstration token. Column: advantage.

    Collectives: one all-reduce over the context-parallel ranks.
    """
    logprobs = stats.logprobs
    p = logprobs.exp()
    weight = coefficient * (-tokens.sequence_means(stats.entropy)).exp()
    imitation = -weight * logprobs
    reinforcement = -p * tokens["advantage"]
    losses = {
        "demonstration_sft_loss": imitation.detach(),
        "demonstration_rl_loss": reinforcement.detach(),
    }
    means = {
        "demonstration_p": p.detach(),
        "demonstration_entropy": stats.entropy.detach(),
        "demonstration_weight": weight,
    }
    return TermOutput(imitation + reinforcement, losses, means, {})
