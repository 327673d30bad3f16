"""TRAPO (arXiv 2512.17636; code Su-my/TRAPO, commit 3a7efa91): prefixes of a demonstration by SFT, continuations by RL.

The answers to a prompt are sampled in rounds. Round 0 has no help. Before each later round k, the mean score of the
prompt's answers so far is compared with ``thresholds[k - 1]``. If it is below, the round's answers begin with the share
``shares[k]`` of the prompt's demonstration; otherwise they have no help either. So hard prompts get more of their
demonstration. A share of 1 samples nothing: the demonstration itself is the answer.

    L = (1 / Z) [ sum over continuations and unhelped answers of surrogate(r, A)
                  + sft_coefficient x sum over trained prefixes of -sg(min(1, p / threshold)) log p ]

All answers to a prompt, from all rounds, are one group for A. In each round the prefix of one answer is trained; the
other answers of the round begin with the same tokens. The weight min(1, p / threshold) is TrSFT: unlikely tokens get
the gradient of DFT and likely ones that of SFT, so no token has a larger gradient than at p = threshold.

As in the authors' code: rounds of 4, 2, 1 and 1 answers with shares 0, 0.25, 0.5 and 1; the thresholds are sums there
(2 of 4, 4 of 6, 7 of 7). What differs: the code ends a prefix at an empty line if one is near, and samples one token
after a whole demonstration; here a prefix has floor(share x length) tokens, and nothing follows a whole demonstration.
When sequences are averaged, a prefix and its continuation count as two.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from megatron_chord.config import BatchConfig, ObjectiveConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import TRAPOConfig, TrustRegionWeight
from megatron_chord.losses.policy import group_advantages
from megatron_chord.losses.sft import sft_term
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, Method, policy_term, refuse_dynamic_sampling
from megatron_chord.methods.chord import SFT
from megatron_chord.methods.groups import POLICY, make_group, reward_stats, rollout_is_trained
from megatron_chord.methods.prefix_rft import prefix_of
from megatron_chord.records import GradedRollouts, Part, Prompt, Rollout, TrainSample
from megatron_chord.sampling.context import DrawnPrompt, StepContext
from megatron_chord.sampling.rounds import TooManyGraderErrors


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of a prompt's group."""

    prompt: Prompt
    prefix: tuple[int, ...]
    """The part of the demonstration with which it begins. With a whole demonstration it is the answer."""
    rollout: Rollout | None
    """The sampled continuation; None after a whole demonstration."""
    reward: float
    is_prefix_trained: bool


@dataclass(frozen=True, kw_only=True)
class TRAPO(Method):
    settings: TRAPOConfig = field(default_factory=TRAPOConfig)

    needs_demonstrations: ClassVar[bool] = True

    def max_sampling_rounds(self, batch: BatchConfig) -> int:
        return len(self.settings.counts)

    def check(self, run: RunConfig) -> None:
        if sum(self.settings.counts) != run.batch.rollouts:
            raise ValueError(
                f"method.counts {list(self.settings.counts)} adds up to {sum(self.settings.counts)}, but "
                f"batch.rollouts is {run.batch.rollouts}: the rounds divide a prompt's rollouts"
            )
        refuse_dynamic_sampling(run.batch, "method trapo helps these with their demonstrations")

    def collect(self, context: StepContext) -> Collected:
        sampled = context.groups(context.batch.prompts, num_rollouts=self.settings.counts[0])
        drawn = [item for item, _ in sampled]
        rounds: list[list[GradedRollouts]] = [[answers for _, answers in sampled]]
        for number in range(1, len(self.settings.counts)):
            rounds.append(self._next_round(number, drawn, rounds, context))
        groups = [group for of_prompt in zip(*rounds, strict=True) if len(group := answers_of(of_prompt)) > 1]
        if not groups:
            raise TooManyGraderErrors(
                f"step {context.now.step}: no prompt has two answers whose grading succeeded"
            )
        lengths = {item.prompt.id: len(context.demonstration(item.prompt)) for item in drawn}
        first = [group for answers in rounds[0] if (group := make_group(answers)) is not None]
        return Collected(
            samples=list(samples_of(groups, context.objective)),
            weights={POLICY: 1.0, SFT: self.settings.sft_coefficient},
            stats={
                **(reward_stats(first, num_sampled=len(drawn)) if first else {}),
                **guidance_stats(groups, lengths),
            },
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        prefix = sft_term(
            pool=POLICY,
            weight=TrustRegionWeight(threshold=self.settings.threshold),
            temperature=self.settings.sft_temperature,
            aggregation=objective.aggregation,
            aggregation_length=objective.aggregation_length,
        )
        return {POLICY: policy_term(objective), SFT: prefix}

    def _next_round(
        self,
        number: int,
        drawn: Sequence[DrawnPrompt],
        before: Sequence[Sequence[GradedRollouts]],
        context: StepContext,
    ) -> list[GradedRollouts]:
        """The answers of round ``number`` for every prompt, in the order of ``drawn``."""
        share, threshold = self.settings.shares[number], self.settings.thresholds[number - 1]
        helped = [is_below([answers[index] for answers in before], threshold) for index in range(len(drawn))]
        whole = [index for index, is_helped in enumerate(helped) if is_helped and share == 1]
        asked = [index for index in range(len(drawn)) if index not in whole]
        found: dict[int, GradedRollouts] = {}
        if whole:
            found |= zip(whole, context.graded_demonstrations([drawn[index] for index in whole]), strict=True)
        if asked:
            sampled = context.rollouts(
                [drawn[index] for index in asked],
                num_rollouts=self.settings.counts[number],
                attempt=f"round{number}",
                prefixes=[
                    prefix_of(context.demonstration(drawn[index].prompt), share) if helped[index] else ()
                    for index in asked
                ],
            )
            found |= zip(asked, sampled, strict=True)
        return [found[index] for index in range(len(drawn))]


def is_below(rounds: Sequence[GradedRollouts], threshold: float) -> bool:
    """True if the mean score of a prompt's answers is below ``threshold``. False if no grading succeeded."""
    scores = [grade.score for answers in rounds for grade in answers.grades if grade.score is not None]
    return bool(scores) and statistics.fmean(scores) < threshold


def answers_of(rounds: Sequence[GradedRollouts]) -> list[Answer]:
    """The group of one prompt: the answers of all rounds whose grading succeeded. The first answer of each round that
    has a prefix trains it."""
    found: list[Answer] = []
    for answers in rounds:
        is_first = True
        for rollout, reward in zip(answers.rollouts, answers.rewards, strict=True):
            if reward is None:
                continue
            is_whole = not rollout.logprobs  # nothing of it was sampled
            prefix = rollout.token_ids if is_whole else answers.prefix
            found.append(
                Answer(
                    prompt=answers.prompt,
                    prefix=prefix,
                    rollout=None if is_whole else rollout,
                    reward=reward,
                    is_prefix_trained=bool(prefix) and is_first,
                )
            )
            is_first = False
    return found


def samples_of(groups: Sequence[Sequence[Answer]], objective: ObjectiveConfig) -> Iterator[TrainSample]:
    """A sample for each answer of which any token is trained."""
    rewards = [[answer.reward for answer in group] for group in groups]
    advantages = group_advantages(rewards, kind=objective.advantage, eps=objective.advantage_eps)
    for group, of_group in zip(groups, advantages, strict=True):
        is_equal = len({answer.reward for answer in group}) == 1
        for answer, advantage in zip(group, of_group, strict=True):
            is_continued = answer.rollout is not None and rollout_is_trained(answer.rollout, objective)
            sample = sample_of(
                answer,
                advantage,
                trains_rollout=is_continued and not (is_equal and objective.equal_groups == "drop"),
            )
            if sample.parts:
                yield sample


def sample_of(answer: Answer, advantage: float, *, trains_rollout: bool) -> TrainSample:
    """A sample of prompt, prefix and continuation: the prefix is trained under ``sft``, the rest under ``policy``.

    It ends before a continuation that is not trained.
    """
    start = len(answer.prompt.token_ids)
    middle = start + len(answer.prefix)
    continuation = answer.rollout.token_ids if trains_rollout and answer.rollout is not None else ()
    token_ids = np.array([*answer.prompt.token_ids, *answer.prefix, *continuation], np.int64)
    routes = None if answer.rollout is None else answer.rollout.routes
    parts: list[Part] = []
    if answer.is_prefix_trained:
        parts.append(Part(term=SFT, positions=np.arange(start, middle)))
    if trains_rollout and answer.rollout is not None:
        logprobs = np.array(answer.rollout.logprobs, np.float32)
        positions = np.arange(middle, middle + len(continuation))
        constants = {"rollout_logprob": logprobs, "advantage": advantage}
        parts.append(Part(term=POLICY, positions=positions, constants=constants))
    return TrainSample(
        token_ids=token_ids,
        parts=tuple(parts),
        routes=None if routes is None else routes[: len(token_ids)],
    )


def guidance_stats(groups: Sequence[Sequence[Answer]], lengths: dict[str, int]) -> dict[str, Any]:
    """Metrics of the help, in addition to ``reward_mean``, which is the mean of round 0. ``lengths``: tokens of each
    prompt's demonstration, by the prompt's id."""
    answers = [answer for group in groups for answer in group]
    helped = [answer for answer in answers if answer.prefix]
    shares = [len(answer.prefix) / lengths[answer.prompt.id] for answer in helped]
    return {
        "guided_answers": len(helped) / len(answers),
        "guided_prompts": statistics.fmean(any(answer.prefix for answer in group) for group in groups),
        "prefix_share": statistics.fmean(shares) if shares else 0.0,
        **({"guided_reward_mean": statistics.fmean(answer.reward for answer in helped)} if helped else {}),
    }
