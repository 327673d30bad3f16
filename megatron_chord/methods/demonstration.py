"""Groups of a prompt's rollouts together with the prompt's demonstration: used by LUFFY, RL-PLUS and SRFT."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_chord.config import ObjectiveConfig
from megatron_chord.methods.base import Collected
from megatron_chord.methods.groups import (
    POLICY,
    answer_sample,
    group_is_trained,
    policy_samples,
    sample_groups,
    with_advantages,
)
from megatron_chord.records import GradedRollouts, RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext

DEMONSTRATION = "demonstration"


@dataclass(frozen=True, kw_only=True)
class GuidedGroup:
    """One prompt's rollouts and its demonstration."""

    members: RolloutGroup
    """The rollouts, followed by the demonstration. Advantages are computed over all of them together."""
    is_guided: bool
    """True if ``members`` has the demonstration. False if its grading failed; then ``members`` has rollouts only."""

    @property
    def own(self) -> RolloutGroup:
        """The rollouts with their advantages, without the demonstration."""
        count = len(self.members.rollouts) - self.is_guided
        return replace(
            self.members,
            rollouts=self.members.rollouts[:count],
            texts=self.members.texts[:count],
            rewards=self.members.rewards[:count],
            advantages=self.members.advantages[:count],
        )


@dataclass(frozen=True, kw_only=True)
class GuidedGroups:
    """A step's groups and the metrics of their sampling."""

    groups: Sequence[GuidedGroup]
    stats: dict[str, Any]


def sample_guided(context: StepContext) -> GuidedGroups:
    """Sample ``batch.prompts`` groups, each with ``batch.rollouts`` rollouts and one demonstration.

    The demonstration is graded like a rollout. Dynamic sampling looks at the rollouts only: it replaces a group whose
    rollouts have equal rewards, also if the reward of the demonstration differs.

    Raises:
        TooManyGraderErrors: too many gradings of rollouts failed.
    """
    sampled = sample_groups(context)
    demonstrations = context.graded_demonstrations(sampled.drawn)
    guided = [answers.rewards[0] is not None for answers in demonstrations]
    members = with_advantages(list(map(_joined, sampled.groups, demonstrations)), context.objective)
    groups = [
        GuidedGroup(members=group, is_guided=is_guided)
        for group, is_guided in zip(members, guided, strict=True)
    ]
    last = [group.members for group in groups if group.is_guided]
    stats = {**sampled.stats, "demonstration_errors": guided.count(False)}
    if last:
        stats |= {
            "demonstration_reward": statistics.fmean(group.rewards[-1] for group in last),
            "demonstration_advantage": statistics.fmean(group.advantages[-1] for group in last),
        }
    return GuidedGroups(groups=groups, stats=stats)


def trained_groups(groups: Sequence[GuidedGroup], objective: ObjectiveConfig) -> list[GuidedGroup]:
    """The groups that ``objective.equal_groups`` lets train.

    A group whose rollouts have equal rewards counts as unequal if the demonstration's reward differs.
    """
    return [group for group in groups if group_is_trained(group.members, objective)]


def demonstration_samples(groups: Sequence[GuidedGroup]) -> list[TrainSample]:
    """A sample of the term ``demonstration`` for each group's demonstration, with the constant ``advantage``."""
    return [
        answer_sample(
            group.members.prompt,
            group.members.rollouts[-1].token_ids,
            term=DEMONSTRATION,
            advantage=group.members.advantages[-1],
        )
        for group in groups
        if group.is_guided
    ]


def collect_mixed(context: StepContext) -> Collected:
    """Collect a step with two terms of weight 1: rollouts under ``policy``, demonstrations under ``demonstration``.

    The samples of both have the constant ``advantage``.
    """
    guided = sample_guided(context)
    trained = trained_groups(guided.groups, context.objective)
    # `trained` has only groups to train. Rollouts of equal rewards stay, because their advantage is not 0 if the reward
    # of their demonstration differs.
    own = policy_samples([group.own for group in trained], replace(context.objective, equal_groups="keep"))
    return Collected(
        samples=own + demonstration_samples(trained),
        weights={POLICY: 1.0, DEMONSTRATION: 1.0},
        stats=guided.stats,
    )


def _joined(group: RolloutGroup, answers: GradedRollouts) -> RolloutGroup:
    """The group followed by the demonstration, if its grading succeeded. Advantages are not computed yet."""
    (reward,) = answers.rewards
    if reward is None:
        return group
    return replace(
        group,
        rollouts=group.rollouts + answers.rollouts,
        texts=group.texts + answers.texts,
        rewards=(*group.rewards, reward),
        advantages=(*group.advantages, 0.0),
    )
