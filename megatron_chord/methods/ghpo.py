"""GHPO (arXiv 2507.10628; code hkgc-1/GHPO): prompts that are too hard are sampled again with a hint.

If all rollouts of a prompt are wrong, the prompt is sampled again with a hint: the first ``stage_share`` of its
reference solution, appended to the last user message. If all are wrong again, the hint is twice as long, and so on, up
to ``stages`` times. The group that was sampled last is trained by ordinary GRPO. There is no SFT loss: the hint is a
part of the prompt, and prompt tokens are not trained. Evaluation uses no hints.

As in the authors' code, a hint is cut by characters, and an answer is right or wrong by the grader's score alone. The
wording of ``cue`` is ours. If a prompt with a hint is too long, the authors' code cuts off the beginning of the prompt;
here the prompt keeps the last group whose prompt was short enough.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from megatron_chord.config import BatchConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import GHPOConfig
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, Method, policy_term, refuse_dynamic_sampling
from megatron_chord.methods.groups import (
    POLICY,
    make_group,
    policy_samples,
    reward_stats,
    whole_groups,
    with_advantages,
    with_last_message,
)
from megatron_chord.records import GradedRollouts, Prompt
from megatron_chord.sampling.context import DrawnPrompt, StepContext


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A prompt with the group that was sampled last for it."""

    drawn: DrawnPrompt
    """The prompt without a hint."""
    graded: GradedRollouts
    stage: int = 0
    """Number of the hint in ``graded.prompt``; 0 means no hint."""
    refused: bool = False
    """True if the next hint would make the prompt too long."""


@dataclass(frozen=True, kw_only=True)
class GHPO(Method):
    settings: GHPOConfig = field(default_factory=GHPOConfig)

    needs_demonstrations: ClassVar[bool] = True

    def max_sampling_rounds(self, batch: BatchConfig) -> int:
        return 1 + self.settings.stages

    def check(self, run: RunConfig) -> None:
        if self.settings.start_step >= run.steps:
            raise ValueError(
                f"method.start_step {self.settings.start_step} must be below the run's steps, {run.steps}"
            )
        refuse_dynamic_sampling(run.batch, "method ghpo needs them for its hints")

    def collect(self, context: StepContext) -> Collected:
        batch, objective = context.batch, context.objective
        sampled = context.groups(batch.prompts, num_rollouts=batch.rollouts)
        trials = [Trial(drawn=item, graded=answers) for item, answers in sampled]
        first = [group for _, answers in sampled if (group := make_group(answers)) is not None]
        for stage in range(
            1, self.settings.stages + 1 if context.now.step >= self.settings.start_step else 1
        ):
            trials = self._next_stage(trials, stage, context)
        pairs = whole_groups([trial.graded for trial in trials], step=context.now.step)
        groups = with_advantages([group for _, group in pairs], objective)
        return Collected(
            samples=policy_samples(groups, objective),
            weights={POLICY: 1.0},
            stats={**reward_stats(first or groups, num_sampled=len(sampled)), **hint_stats(trials)},
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        return {POLICY: policy_term(objective)}

    def _next_stage(self, trials: Sequence[Trial], stage: int, context: StepContext) -> list[Trial]:
        """Sample the trials whose rollouts are all wrong again, with this stage's hint. Returns all trials."""
        share, limit = stage * self.settings.stage_share, context.data.max_prompt_tokens
        asked: dict[int, DrawnPrompt] = {}
        after = list(trials)
        for index in trials_to_repeat(trials, wrong_at_most=self.settings.wrong_at_most):
            prompt = trials[index].drawn.prompt
            hint = beginning(context.template.decode(context.demonstration(prompt)), share)
            harder = hinted(prompt, hint, cue=self.settings.cue, template=context.template)
            if len(harder.token_ids) > limit:
                after[index] = replace(trials[index], refused=True)
            else:
                asked[index] = replace(trials[index].drawn, prompt=harder)
        if asked:
            answers = context.rollouts(
                list(asked.values()), num_rollouts=context.batch.rollouts, attempt=f"hint{stage}"
            )
            for index, graded in zip(asked, answers, strict=True):
                after[index] = replace(trials[index], graded=graded, stage=stage)
        return after


def trials_to_repeat(trials: Sequence[Trial], *, wrong_at_most: float) -> list[int]:
    """Indices of the trials to sample again: all of their graded rollouts are wrong, and no hint was too long yet."""
    return [
        index
        for index, trial in enumerate(trials)
        if not trial.refused and is_all_wrong(trial.graded, wrong_at_most=wrong_at_most)
    ]


def is_all_wrong(graded: GradedRollouts, *, wrong_at_most: float) -> bool:
    """True if every graded rollout is wrong. False if no grading succeeded, because then the prompt is not judged."""
    scores = [grade.score for grade in graded.grades if grade.score is not None]
    return bool(scores) and max(scores) <= wrong_at_most


def beginning(solution: str, share: float) -> str:
    """The first ``share`` of the text's characters."""
    return solution[: round(share * len(solution))]


def hinted(prompt: Prompt, hint: str, *, cue: str, template: ChatTemplate) -> Prompt:
    """The same problem with ``cue`` and hint appended to its last message."""
    text = f"{prompt.messages[-1]['content']}\n{cue}\n{hint}"
    return with_last_message(prompt, text, template=template)


def hint_stats(trials: Sequence[Trial]) -> dict[str, Any]:
    """Metrics of the hints, in addition to ``reward_mean``, which is the mean of the first rollouts, without hints."""
    helped = [trial for trial in trials if trial.stage]
    rewards = [reward for trial in helped for reward in trial.graded.rewards if reward is not None]
    return {
        "hinted_groups": len(helped) / len(trials),
        "hint_stage": statistics.fmean(trial.stage for trial in helped) if helped else 0.0,
        "hints_too_long": sum(trial.refused for trial in trials),
        **({"hinted_reward_mean": statistics.fmean(rewards)} if rewards else {}),
    }
