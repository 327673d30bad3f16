"""Sampling that most methods share: graded rollouts -> groups with advantages -> samples of the policy term."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_chord.config import ObjectiveConfig
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.losses.policy import group_advantages
from megatron_chord.records import GradedRollouts, Part, Prompt, Rollout, RolloutGroup, TrainSample
from megatron_chord.sampling.context import DrawnPrompt, StepContext
from megatron_chord.sampling.rounds import TooManyGraderErrors

POLICY = "policy"


@dataclass(frozen=True, kw_only=True)
class StepGroups:
    """A step's groups and the metrics of their sampling."""

    drawn: Sequence[DrawnPrompt]
    """The prompts of ``groups``, in the same order."""
    groups: Sequence[RolloutGroup]
    stats: Mapping[str, Any]

    @property
    def reward_mean(self) -> float:
        return self.stats["reward_mean"]


def sample_groups(
    context: StepContext, *, prompts: int | None = None, rollouts: int | None = None
) -> StepGroups:
    """Sample ``prompts`` groups of ``rollouts`` rollouts. Default: ``batch.prompts`` and ``batch.rollouts``.

    If ``batch.sampling_attempts`` is above 1, dynamic sampling (DAPO, arXiv 2503.14476) replaces groups of equal scores
    by groups of further prompts.

    Raises:
        TooManyGraderErrors: no prompt has two rollouts whose grading succeeded.
    """
    wanted = context.batch.prompts if prompts is None else prompts
    size = context.batch.rollouts if rollouts is None else rollouts
    attempts = context.batch.sampling_attempts
    useful: list[tuple[DrawnPrompt, RolloutGroup]] = []
    equal: list[tuple[DrawnPrompt, RolloutGroup]] = []
    num_graded = rounds = 0
    while rounds < attempts and len(useful) < wanted:
        sampled = context.groups(wanted - len(useful), num_rollouts=size)
        num_graded += len(sampled)
        for item, answers in sampled:
            group = make_group(answers)
            if group is not None:
                # Compare scores and not rewards: penalties for form and length must not make a group unequal (DAPO).
                scores = {grade.score for grade in answers.grades} - {None}
                (equal if len(scores) == 1 else useful).append((item, group))
        rounds += 1
    everything = useful + equal
    if not everything:
        raise TooManyGraderErrors(
            f"step {context.now.step}: no prompt has two rollouts whose grading succeeded"
        )
    kept = sorted(useful + equal[: wanted - len(useful)], key=lambda pair: pair[0].position)
    stats = reward_stats([group for _, group in everything], num_sampled=num_graded)
    if attempts > 1:
        share = len(equal) / len(everything)
        stats |= {"sampling_rounds": rounds, "prompts_sampled": num_graded, "equal_score_groups": share}
    return StepGroups(
        drawn=[item for item, _ in kept],
        groups=with_advantages([group for _, group in kept], context.objective),
        stats=stats,
    )


def whole_groups(graded: Sequence[GradedRollouts], *, step: int) -> list[tuple[GradedRollouts, RolloutGroup]]:
    """Each prompt that has a group, with its group. Advantages are not computed yet.

    Raises:
        TooManyGraderErrors: no prompt has a group.
    """
    pairs = [(item, group) for item in graded if (group := make_group(item)) is not None]
    if not pairs:
        raise TooManyGraderErrors(f"step {step}: no prompt has two rollouts whose grading succeeded")
    return pairs


def reward_stats(groups: Sequence[RolloutGroup], *, num_sampled: int) -> dict[str, Any]:
    """Metrics of the rewards of ``groups``, which remain of ``num_sampled`` prompts."""
    rewards = [reward for group in groups for reward in group.rewards]
    return {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "equal_reward_groups": statistics.fmean(group.has_equal_rewards for group in groups),
        "dropped_groups": num_sampled - len(groups),
    }


def make_group(graded: GradedRollouts) -> RolloutGroup | None:
    """The group of one prompt, without advantages. Rollouts whose grading failed are left out.

    None if fewer than two rollouts remain.
    """
    kept = [(i, reward) for i, reward in enumerate(graded.rewards) if reward is not None]
    if len(kept) < 2:
        return None
    return RolloutGroup(
        prompt=graded.prompt,
        rollouts=tuple(graded.rollouts[i] for i, _ in kept),
        texts=tuple(graded.texts[i] for i, _ in kept),
        rewards=tuple(reward for _, reward in kept),
        advantages=(0.0,) * len(kept),
    )


def with_advantages(groups: Sequence[RolloutGroup], objective: ObjectiveConfig) -> list[RolloutGroup]:
    """The groups with advantages computed by ``objective.advantage``."""
    rewards = [group.rewards for group in groups]
    found = group_advantages(rewards, kind=objective.advantage, eps=objective.advantage_eps)
    return [replace(group, advantages=advantages) for group, advantages in zip(groups, found, strict=True)]


def policy_samples(groups: Sequence[RolloutGroup], objective: ObjectiveConfig) -> list[TrainSample]:
    """Every rollout that is trained on, under the term ``policy``."""
    return [
        rollout_sample(group.prompt, rollout, advantage=advantage)
        for group in groups
        if group_is_trained(group, objective)
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        if rollout_is_trained(rollout, objective)
    ]


def group_is_trained(group: RolloutGroup, objective: ObjectiveConfig) -> bool:
    """True if the group is trained, by ``objective.equal_groups``."""
    return objective.equal_groups == "keep" or not group.has_equal_rewards


def rollout_is_trained(rollout: Rollout, objective: ObjectiveConfig) -> bool:
    """True if the rollout is trained, by ``objective.truncated``."""
    return objective.truncated == "keep" or rollout.finish_reason != "length"


def with_last_message(prompt: Prompt, content: str, *, template: ChatTemplate) -> Prompt:
    """The prompt with another text as its last message.

    Raises:
        RowError: the text has a control token, or the template refuses the conversation.
    """
    *before, last = prompt.messages
    messages = (*before, {**last, "content": content})
    return replace(prompt, messages=messages, token_ids=template.prompt_ids(messages, tools=prompt.tools))


def rollout_sample(
    prompt: Prompt, rollout: Rollout, *, term: str = POLICY, **constants: float
) -> TrainSample:
    """A sample of a prompt and its rollout, with the rollout's routes. Its constants are ``rollout_logprob`` and those
    given."""
    logprobs = np.array(rollout.logprobs, np.float32)
    sample = answer_sample(prompt, rollout.token_ids, term=term, rollout_logprob=logprobs, **constants)
    return replace(sample, routes=rollout.routes)


def answer_sample(
    prompt: Prompt, answer: Sequence[int], *, term: str, **constants: float | np.ndarray
) -> TrainSample:
    """A sample of a prompt and any answer. All tokens of the answer are trained under ``term``."""
    start = len(prompt.token_ids)
    return TrainSample(
        token_ids=np.array([*prompt.token_ids, *answer], np.int64),
        parts=(Part(term=term, positions=np.arange(start, start + len(answer)), constants=constants),),
    )
