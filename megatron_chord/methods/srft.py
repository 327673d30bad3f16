"""SRFT (arXiv 2506.19767): imitation and reinforcement in one step, each weighted by the policy's entropy.

    L = E_demonstrations[ -w_sft log p - p A ] + E_rollouts[ -w_rl log p where the answer is right, log p where wrong ]
    w_sft = sft_coefficient exp(-H)      w_rl = rl_coefficient exp(H)      H = mean token entropy of the sequence

Both w are constants, and so is A, the demonstration's advantage over rollouts and demonstration together. Rollouts are
pushed by the sign of their reward alone. Nothing is clipped, and no ratio is taken of the rollouts.

The publication leaves open what its expectations are averaged over and which H it means. Here each of the two is a mean
of its own by ``objective.aggregation`` (right and wrong rollouts share theirs), and H is the sequence's as in the only
code there is, which is not the authors'. That code sums the reinforcement over a constant length and gives p A
LUFFY's shaping, which is not in the publication; neither is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from megatron_chord.config import ObjectiveConfig, RunConfig
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
    "entropy_bonus",
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
                "rollout.asynchronous: method srft pushes rollouts without a ratio, so nothing corrects for the older "
                "weights that sampled them; leave it out"
            )
        if run.rollout.carries:
            raise ValueError(
                "rollout.partial with unfinished: carry: method srft pushes "
                "rollouts without a ratio, so nothing corrects for the older weights that sampled the carried part; "
                "leave rollout.partial out, or set unfinished: drop"
            )
        default = ObjectiveConfig()
        for name in UNUSED:
            if getattr(run.objective, name) != getattr(default, name):
                raise ValueError(
                    f"objective.{name}: method srft pushes rollouts by the sign of their reward, without a ratio, a "
                    "penalty or a bonus; leave it out"
                )

    def collect(self, context: StepContext, run: RunConfig) -> Collected:
        guided = sample_guided(context, run)
        trained = trained_groups(guided.groups, run.objective)
        own = signed_samples(trained, run.objective, positive_reward=self.settings.positive_reward)
        return Collected(
            samples=own + demonstration_samples(trained),
            weights={POLICY: 1.0, DEMONSTRATION: 1.0},
            stats=guided.stats,
        )

    def terms(self, run: RunConfig) -> dict[str, Term]:
        def of_rollouts(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return signed_loss(stats, tokens, coefficient=self.settings.rl_coefficient)

        def of_demonstrations(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return imitation_loss(stats, tokens, coefficient=self.settings.sft_coefficient)

        return {
            POLICY: averaged_term(run, of_rollouts, pool=POLICY),
            DEMONSTRATION: averaged_term(run, of_demonstrations, pool=DEMONSTRATION),
        }


def signed_samples(
    groups: Sequence[GuidedGroup], objective: ObjectiveConfig, *, positive_reward: float
) -> list[TrainSample]:
    """Every rollout that is trained on, with the constant ``sign``: 1 where its reward is above, else -1."""
    return [
        rollout_sample(own.prompt, rollout, sign=1.0 if reward > positive_reward else -1.0)
        for own in (group.own for group in groups)
        for rollout, reward in zip(own.rollouts, own.rewards, strict=True)
        if rollout_is_trained(rollout, objective)
    ]


def signed_loss(stats: TokenStats, tokens: TermTokens, *, coefficient: float) -> TermOutput:
    """-w_rl log p of right rollouts, log p of wrong ones; columns sign, rollout_logprob.

    One all-reduce over the context ranks.
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
    """-w_sft log p - p A per demonstration token; column advantage. One all-reduce over the context ranks."""
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
