"""DPO on a fixed mixture of on-policy and off-policy pairs, as in SimpleMix (arXiv 2505.02363).

Every prompt gives at most one pair. In an on-policy pair the best rollout is chosen and the worst is rejected. In an
off-policy pair the prompt's demonstration is chosen and the worst rollout is rejected. The prompt's position in the
order of draws decides which kind it is. Pairs of equal rewards are left out. The reference model is the initial model,
``model.path``.

Differences from SimpleMix: it makes its pairs once, half of them from the SFT model and half from a published
preference set. Both answers of its off-policy pairs come from that set, and a reward model scores them. Here the
current policy samples the rollouts in every step (online DPO), the rejected answer is always the policy's, and the
run's grader scores the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

from megatron_chord.config import BatchConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import DPOConfig
from megatron_chord.losses.preference import dpo_term
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, Method, refuse_several_updates
from megatron_chord.methods.groups import answer_sample, rollout_sample, sample_groups
from megatron_chord.records import GradedRollouts, Prompt, Rollout, RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext

DPO = "dpo"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt. The rejected one is always a rollout."""

    prompt: Prompt
    chosen: Rollout
    rejected: Rollout
    is_offpolicy: bool
    """True if the chosen answer is the demonstration, which has no log-probs."""


@dataclass(frozen=True, kw_only=True)
class MixedDPO(Method):
    settings: DPOConfig = field(default_factory=DPOConfig)

    needs_demonstrations: ClassVar[bool] = True

    def check(self, run: RunConfig) -> None:
        refuse_several_updates(run.batch, self.name)
        if run.batch.sampling_attempts > 1 and self.settings.offpolicy_share > 0:
            raise ValueError(
                "batch.sampling_attempts above 1 replaces groups of equal scores, but off-policy pairs need them; "
                "leave it out, or set method.offpolicy_share: 0"
            )
        default = type(run.objective)()
        for name in (setting.name for setting in fields(default)):
            if getattr(run.objective, name) != getattr(default, name):
                raise ValueError(
                    f"objective.{name}: method dpo does not use it (its loss is -log sigma(margin of a pair) and has "
                    "no ratio, no advantage and no penalty); leave it out"
                )

    def collect(self, context: StepContext) -> Collected:
        sampled = sample_groups(context)
        off = [is_offpolicy(item.position, self.settings.offpolicy_share) for item in sampled.drawn]
        asked = [item for item, wanted in zip(sampled.drawn, off, strict=True) if wanted]
        graded = iter(context.graded_demonstrations(asked) if asked else [])
        pairs = [
            demonstration_pair(group, next(graded)) if wanted else rollout_pair(group)
            for group, wanted in zip(sampled.groups, off, strict=True)
        ]
        kept = [pair for pair in pairs if pair is not None]
        return Collected(
            samples=pair_samples(kept),
            weights={DPO: 1.0},
            stats={
                **sampled.stats,
                "dpo_pairs": len(kept),
                "dpo_offpolicy_pairs": sum(pair.is_offpolicy for pair in kept),
                "dpo_skipped_prompts": len(pairs) - len(kept),
            },
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        return {DPO: dpo_term(beta=self.settings.beta, max_pairs=batch.prompts)}


def is_offpolicy(position: int, share: float) -> bool:
    """True if the draw at ``position`` gives an off-policy pair.

    Off-policy pairs are evenly spread: the first n draws have floor(n x share) of them.
    """
    return math.floor((position + 1) * share) > math.floor(position * share)


def rollout_pair(group: RolloutGroup) -> Pair | None:
    """The pair of the best and the worst rollout; None if all rewards are equal.

    If several rollouts have the best or the worst reward, the first of them is taken.
    """
    if group.has_equal_rewards:
        return None
    return Pair(
        prompt=group.prompt,
        chosen=group.rollouts[group.rewards.index(max(group.rewards))],
        rejected=worst(group),
        is_offpolicy=False,
    )


def demonstration_pair(group: RolloutGroup, demonstration: GradedRollouts) -> Pair | None:
    """The pair of the demonstration and the worst rollout.

    None if the grading of the demonstration failed, or if its reward is not above that of the worst rollout.
    """
    (answer,), (reward,) = demonstration.rollouts, demonstration.rewards
    if reward is None or reward <= min(group.rewards):
        return None
    return Pair(prompt=group.prompt, chosen=answer, rejected=worst(group), is_offpolicy=True)


def worst(group: RolloutGroup) -> Rollout:
    return group.rollouts[group.rewards.index(min(group.rewards))]


def pair_samples(pairs: Sequence[Pair]) -> list[TrainSample]:
    """Two samples of the term ``dpo`` for each pair."""
    samples: list[TrainSample] = []
    for index, pair in enumerate(pairs):
        if pair.is_offpolicy:
            samples.append(
                answer_sample(
                    pair.prompt,
                    pair.chosen.token_ids,
                    term=DPO,
                    rollout_logprob=0.0,
                    pair=float(index),
                    sign=1.0,
                    is_rollout=0.0,
                )
            )
        else:
            samples.append(
                rollout_sample(
                    pair.prompt, pair.chosen, term=DPO, pair=float(index), sign=1.0, is_rollout=1.0
                )
            )
        samples.append(
            rollout_sample(pair.prompt, pair.rejected, term=DPO, pair=float(index), sign=-1.0, is_rollout=1.0)
        )
    return samples
