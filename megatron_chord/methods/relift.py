"""ReLIFT (arXiv 2506.07527; code TheRoadQaQ/ReLIFT): RL, with SFT on demonstrations of the prompts that it fails.

Every step trains its rollouts by RL. The demonstrations of prompts whose rollouts are all wrong are put into a queue.
If the queue has ``size`` of them, the step ends with one SFT update on the oldest ``size``:

    L_SFT = mean over tokens of -log p  -  entropy_coefficient x mean over tokens of the entropy

This update has a learning rate and an optimizer state of its own (``train.second_adam``), as in the code. There both
optimizers belong to the same weights, too. The queue is a list of prompts' ids; it and the optimizer state are in the
checkpoint. The code leaves out an SFT update whose gradient norm is above a limit; this is not done here.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import ClassVar

from megatron_chord.config import BatchConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import ReLIFTConfig, SimpleWeight
from megatron_chord.losses.sft import sft_term
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, ExtraUpdate, Method, policy_term, refuse_dynamic_sampling
from megatron_chord.methods.chord import SFT, sft_samples
from megatron_chord.methods.groups import (
    POLICY,
    policy_samples,
    reward_stats,
    whole_groups,
    with_advantages,
)
from megatron_chord.records import GradedRollouts
from megatron_chord.sampling.context import StepContext


@dataclass(frozen=True, kw_only=True)
class ReLIFT(Method):
    settings: ReLIFTConfig = field(default_factory=ReLIFTConfig)

    needs_demonstrations: ClassVar[bool] = True

    def check(self, run: RunConfig) -> None:
        refuse_dynamic_sampling(run.batch, "method relift collects their demonstrations")
        if run.objective.entropy_bonus_on == "all":
            raise ValueError(
                "objective.entropy_bonus_on: method relift trains rollouts and demonstrations in different updates; "
                "set method.entropy_coefficient for demonstrations, and leave this out"
            )

    def extra_rate(self) -> float:
        return self.settings.sft_lr

    def collect(self, context: StepContext) -> Collected:
        batch, objective = context.batch, context.objective
        graded = [answers for _, answers in context.groups(batch.prompts, num_rollouts=batch.rollouts)]
        pairs = whole_groups(graded, step=context.now.step)
        groups = with_advantages([group for _, group in pairs], objective)
        failed = [item.prompt.id for item, _ in pairs if best_score(item) <= self.settings.wrong_at_most]
        waiting: list[str] = [*(context.memory or []), *failed]
        taken: list[str] = []
        if len(waiting) >= self.settings.size:
            taken, waiting = waiting[: self.settings.size], waiting[self.settings.size :]
        imitated = sft_samples([context.sources.demonstration_of[name] for name in taken])
        return Collected(
            samples=policy_samples(groups, objective),
            weights={POLICY: 1.0},
            extra=ExtraUpdate(samples=imitated, weights={SFT: 1.0}) if taken else None,
            memory=waiting,
            stats={
                **reward_stats(groups, num_sampled=len(graded)),
                "failed_prompts": statistics.fmean(item.prompt.id in failed for item, _ in pairs),
                "waiting_demonstrations": len(waiting),
                "sft_updates": int(bool(taken)),
            },
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        demonstration = replace(
            sft_term(weight=SimpleWeight(kind="one"), temperature=self.settings.sft_temperature),
            entropy_bonus=self.settings.entropy_coefficient,
        )
        return {POLICY: policy_term(objective), SFT: demonstration}


def best_score(graded: GradedRollouts) -> float:
    """The best grader score of the rollouts whose grading succeeded, without penalties for form and length."""
    return max(grade.score for grade in graded.grades if grade.score is not None)
