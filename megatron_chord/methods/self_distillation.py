"""Self-distillation: the policy with more information in its prompt teaches the policy without it.

    L = (1 - weight) L_RL + weight L_D        L_D: mean over rollout tokens of D(teacher, policy)

(SDFT, arXiv 2601.19897; OPSD, 2601.18734; SDPO, 2601.20802.) The policy samples its rollouts as always. Then the same
tokens are scored once more, after a prompt that also shows a solution or a verdict (``shows``, ``template``). That is
the teacher. Its log-probs are constants. ``losses.distillation`` estimates the divergence D and its gradient from the
policy's and the teacher's log-probs of the rollout's own tokens.

    shows                     published as        the teacher's prompt has
    right_rollout             SDPO                another rollout of the group, with a reward above ``positive_reward``
    demonstration             SDFT, OPSD          the prompt's own demonstration
    rollout_or_demonstration  -                   such a rollout, or where the group has none, the demonstration
    verdict                   SDPO, rich feedback the rollout itself, whether it is right, and the true result

A rollout is *taught* if it has a teacher. It has none if there is nothing to show, if the teacher's prompt would be
longer than ``teacher_prompt_tokens``, if a shown text has a control token, or if ``teaches: wrong`` excludes it. With
``weight: 1`` only taught rollouts are trained. With a smaller weight all rollouts are, and the denominator of L_D is
that of L_RL, which also counts tokens that are not taught.

Published code: SDPO and TRL's sampled-token mode are ``divergence: reverse_kl`` with ``weight: 1``. The distillation
over the 20 or 100 likeliest tokens or over the whole vocabulary, SDPO's default, is not implemented: it has the same
gradient on average and less variance, but needs the teacher's logits. ``teacher: averaged`` is the teacher of SDPO and
SDFT (``train.averaged``), ``teacher: initial`` OPSD's fixed one.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_chord.config import BatchConfig, DataConfig, ObjectiveConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import SelfDistillationConfig
from megatron_chord.data.rows import RowError
from megatron_chord.data.thinking import without_thinking
from megatron_chord.losses.distillation import distilled
from megatron_chord.losses.policy import correction_weights, old_logprobs, policy_loss
from megatron_chord.losses.terms import TEACHER_COLUMNS, Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, policy_term, refuse_dynamic_sampling
from megatron_chord.methods.groups import (
    POLICY,
    group_is_trained,
    rollout_is_trained,
    rollout_sample,
    sample_groups,
    with_last_message,
)
from megatron_chord.records import Prompt, RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext

SOLUTION = "{problem}\n\nA correct solution of this problem:\n\n{solution}\n\nNow solve the problem."
VERDICT = (
    "{problem}\n\nAn earlier answer:\n\n{attempt}\n\nThis answer is {verdict}. The true result is {truth}. "
    "Now solve the problem."
)
_PLACEHOLDER = re.compile(r"\{(problem|solution|attempt|verdict|truth)\}")


@dataclass(frozen=True, kw_only=True)
class TaughtRollout:
    """A rollout that is trained."""

    sample: TrainSample
    teacher_prompt: tuple[int, ...] | None
    """None if it has no teacher."""


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Method):
    settings: SelfDistillationConfig = field(default_factory=SelfDistillationConfig)

    @property
    def uses_own_demonstrations(self) -> bool:
        return self.settings.shows in ("demonstration", "rollout_or_demonstration")

    def check(self, run: RunConfig) -> None:
        default = ObjectiveConfig()
        if self.settings.weight == 1:
            for name in ("kl", "entropy_bonus"):
                if getattr(run.objective, name) != getattr(default, name):
                    raise ValueError(
                        f"objective.{name} belongs to the RL loss, but method.weight 1 leaves that loss out; set a "
                        f"smaller weight, or leave objective.{name} out"
                    )
        if self.settings.shows != "right_rollout":
            refuse_dynamic_sampling(
                run.batch, f"with method.shows {self.settings.shows} these are taught, too"
            )

        if self.settings.teacher == "averaged" and not run.parallel.distributed_optimizer:
            raise ValueError(
                "method.teacher averaged needs parallel.distributed_optimizer: true; the average is kept and saved as "
                "that optimizer's FP32 weights"
            )

    def averaging_rate(self) -> float | None:
        return self.settings.teacher_rate if self.settings.teacher == "averaged" else None

    def check_positions(self, data: DataConfig, max_positions: int) -> None:
        limit, answer = self.teacher_prompt_limit(data), data.max_response_tokens
        if limit + answer > max_positions:
            raise ValueError(
                f"method.teacher_prompt_tokens {limit} + data.max_response_tokens {answer} = {limit + answer} is "
                f"beyond the model's {max_positions} positions: set method.teacher_prompt_tokens to at most "
                f"{max_positions - answer}"
            )

    def teacher_prompt_limit(self, data: DataConfig) -> int:
        """Maximum number of tokens of a teacher's prompt."""
        return self.settings.teacher_prompt_tokens or data.max_prompt_tokens + data.max_response_tokens

    def collect(self, context: StepContext) -> Collected:
        sampled = sample_groups(context)
        trained = [rollout for group in sampled.groups for rollout in self.taught(group, context)]
        lengths = [len(item.teacher_prompt) for item in trained if item.teacher_prompt is not None]
        num_rollouts = sum(len(group.rollouts) for group in sampled.groups)
        kept = [item for item in trained if self.settings.weight < 1 or item.teacher_prompt is not None]
        return Collected(
            samples=[item.sample for item in kept],
            weights={POLICY: 1.0},
            stats={
                **sampled.stats,
                "taught_rollouts": len(lengths) / num_rollouts,
                **({"teacher_prompt_length": statistics.fmean(lengths)} if lengths else {}),
            },
        )

    def taught(self, group: RolloutGroup, context: StepContext) -> list[TaughtRollout]:
        """The group's rollouts that are trained by L_RL, by L_D or by both."""
        found: list[TaughtRollout] = []
        prompts: dict[str, tuple[int, ...] | None] = {}
        for index, (rollout, advantage) in enumerate(zip(group.rollouts, group.advantages, strict=True)):
            text = self.teacher_text(group, index, context)
            if text is not None and text not in prompts:
                prompts[text] = teacher_prompt(
                    group.prompt, text, context=context, limit=self.teacher_prompt_limit(context.data)
                )
            shown = None if text is None else prompts[text]
            if not rollout_is_trained(rollout, context.objective):
                continue
            if shown is None and not group_is_trained(group, context.objective):
                continue
            sample = rollout_sample(
                group.prompt, rollout, advantage=advantage, taught=0.0 if shown is None else 1.0
            )
            if shown is not None:
                sample = replace(sample, teacher_ids=np.array([*shown, *rollout.token_ids], np.int64))
            found.append(TaughtRollout(sample=sample, teacher_prompt=shown))
        return found

    def teacher_text(self, group: RolloutGroup, index: int, context: StepContext) -> str | None:
        """The last message of the teacher's prompt for rollout ``index``; None if it has no teacher."""
        settings, prompt = self.settings, group.prompt
        is_right = [reward > settings.positive_reward for reward in group.rewards]
        if settings.teaches == "wrong" and is_right[index]:
            return None
        texts = {
            "problem": prompt.messages[-1]["content"],
            "attempt": group.texts[index],
            "verdict": "right" if is_right[index] else "wrong",
            "truth": prompt.truth,
        }
        if settings.shows == "verdict":
            return filled(settings.template or VERDICT, texts)
        solution = None
        if settings.shows != "demonstration":
            solution = another_right(group.texts, is_right, index)
        if solution is None and settings.shows != "right_rollout":
            solution = context.template.turn(prompt.token_ids, context.demonstration(prompt))
        if solution is None:
            return None
        shown = without_thinking(solution) if settings.drop_thinking else solution
        return filled(settings.template or SOLUTION, {**texts, "solution": shown})

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        settings, base = self.settings, policy_term(objective)

        def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return self_distillation_loss(stats, tokens, objective, settings)

        return {
            POLICY: replace(
                base,
                loss=loss,
                scored=base.scored | {TEACHER_COLUMNS[settings.teacher]},
                zero_gradient_column=None,
            )
        }


def another_right(texts: Sequence[str], is_right: Sequence[bool], index: int) -> str | None:
    """The next right rollout after ``index``, in a circle; None if no other rollout is right."""
    count = len(texts)
    places = [(index + offset) % count for offset in range(1, count)]
    return next((texts[place] for place in places if is_right[place]), None)


def filled(template: str, texts: dict[str, str]) -> str:
    """Replace the placeholders in ``template`` that ``texts`` has. Braces in the inserted texts have no meaning."""
    return _PLACEHOLDER.sub(lambda found: texts.get(found[1], found[0]), template)


def teacher_prompt(prompt: Prompt, text: str, *, context: StepContext, limit: int) -> tuple[int, ...] | None:
    """The token ids of the prompt with ``text`` as its last message. None if there are more than ``limit``, or if a
    text has a control token."""
    try:
        token_ids = with_last_message(prompt, text, template=context.template).token_ids
    except RowError:
        return None
    return token_ids if len(token_ids) <= limit else None


def self_distillation_loss(
    stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig, settings: SelfDistillationConfig
) -> TermOutput:
    """(1 - weight) x policy loss + weight x divergence, per token of a rollout.

    Columns: those of ``policy_loss``; taught (1 for tokens that have a teacher, else 0); of ``TEACHER_COLUMNS`` that of
    ``settings.teacher``. The importance weight of the divergence has the denominator of ``objective.ratio_from``, and
    ``objective.correction`` multiplies it, too.
    """
    rl = policy_loss(stats, tokens, objective)
    old = old_logprobs(stats, tokens, objective)
    taught = tokens["taught"]
    found = distilled(
        stats.logprobs,
        tokens[TEACHER_COLUMNS[settings.teacher]],
        old,
        divergence=settings.divergence,
        max_ratio=settings.max_ratio,
        max_log_ratio=settings.max_log_ratio,
    )
    divergence = taught * found.loss
    if objective.correction is not None and objective.correction.mode != "none":
        divergence = divergence * correction_weights(old, tokens, objective.correction)[0]
    weight = settings.weight
    means: dict[str, Any] = {
        **rl.means,
        "taught": taught,
        "teacher_log_ratio": taught * found.log_ratio,
        "distillation_ratio": found.weight,
    }
    return TermOutput(
        divergence if weight == 1 else (1 - weight) * rl.loss + weight * divergence,
        {**rl.losses, "distillation_loss": divergence.detach()},
        means,
        {**rl.maxima, "teacher_log_ratio_max": taught * found.log_ratio.abs()},
    )
