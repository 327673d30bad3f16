"""Groups in which a prompt's own demonstration stands beside the policy's rollouts: LUFFY, RL-PLUS, SRFT."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.methods.base import Collected
from megatron_chord.methods.groups import (
    POLICY,
    answer_sample,
    group_is_trained,
    policy_samples,
    sample_groups,
    with_advantages,
)
from megatron_chord.records import RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.sampling.rounds import GradedRollouts

DEMONSTRATION = "demonstration"


@dataclass(frozen=True, kw_only=True)
class GuidedGroup:
    """One prompt's rollouts and its demonstration."""

    members: RolloutGroup
    """The rollouts and, as the last, the demonstration; advantages are over all of them together."""
    is_guided: bool
    """False: the grading of the demonstration failed, and ``members`` are the rollouts alone."""

    @property
    def own(self) -> RolloutGroup:
        """The rollouts with their part of the advantages."""
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
    """A step's groups and what their sampling has to report."""

    groups: Sequence[GuidedGroup]
    stats: dict[str, Any]


def sample_guided(context: StepContext, run: RunConfig) -> GuidedGroups:
    """``batch.prompts`` groups of ``batch.rollouts`` rollouts and one demonstration, which the verifier grades too.

    Dynamic sampling judges the rollouts: a group of equal rewards is replaced although its demonstration's may differ.

    Raises:
        TooManyGraderErrors: too many gradings of rollouts failed.
    """
    sampled = sample_groups(context, run)
    demonstrations = context.graded_demonstrations(sampled.drawn)
    guided = [answers.rewards[0] is not None for answers in demonstrations]
    members = with_advantages(list(map(_joined, sampled.groups, demonstrations)), run.objective)
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
    """By ``objective.equal_groups``; a demonstration with another reward than all rollouts makes a group unequal."""
    return [group for group in groups if group_is_trained(group.members, objective)]


def demonstration_samples(groups: Sequence[GuidedGroup]) -> list[TrainSample]:
    """The demonstrations under the term ``demonstration``, with the constant ``advantage``."""
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


def collect_mixed(context: StepContext, run: RunConfig) -> Collected:
    """A step of rollouts under ``policy`` and demonstrations under ``demonstration``, both at weight 1.

    Both have the constant ``advantage``.
    """
    guided = sample_guided(context, run)
    trained = trained_groups(guided.groups, run.objective)
    # Which groups count is settled: rollouts of equal rewards have an advantage where their demonstration's differs.
    own = policy_samples([group.own for group in trained], replace(run.objective, equal_groups="keep"))
    return Collected(
        samples=own + demonstration_samples(trained),
        weights={POLICY: 1.0, DEMONSTRATION: 1.0},
        stats=guided.stats,
    )


def _joined(group: RolloutGroup, answers: GradedRollouts) -> RolloutGroup:
    """The demonstration, where its grading succeeded, as the group's last; advantages are still to be computed."""
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
