"""ReMix (arXiv 2507.06892): in the first stage a part of every batch is rollouts that an older policy sampled.

Stage 1 (steps before ``mix_steps``): with probability ``stale_share`` a group of the batch is replaced by one that
pi_{k-i}, i <= ``lag``, sampled in an earlier step. Its tokens train under the term ``stale``. Stage 2 is on-policy.

    L_stale = -min(r A, clip(r, c - clip_low, c + clip_high) A),    r = pi_theta / pi_{k-i},  c = pi_k / pi_{k-i}

pi_k is the policy before the step's first update; c and A are constants. In the first update pi_theta = pi_k, so r = c.
So the clip has an effect only if ``batch.epochs`` or ``batch.updates_per_step`` is above 1 (the paper: two updates per
batch).

``objective.ratio_from`` and ``correction`` apply to the fresh tokens, which are trained like the policy branch of
``chord``.

Not implemented: the KL-convex constraint beta [lambda KL(pi_theta || pi_base) + (1 - lambda) KL(pi_theta || pi_{k-1})]
and the new pi_base = pi_T of stage 2, which belongs to it. No source that we could read gives beta, and the constraint
needs reference models that change during the run. ``objective.kl`` is the KL to the initial policy, for fresh and stale
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from megatron_chord.config import BatchConfig, ObjectiveConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import ReMixConfig
from megatron_chord.losses.policy import MAX_LOG_RATIO, with_penalties
from megatron_chord.losses.terms import Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, policy_term
from megatron_chord.methods.groups import (
    POLICY,
    group_is_trained,
    policy_samples,
    rollout_is_trained,
    sample_groups,
)
from megatron_chord.records import Part, RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.sampling.rounds import NUM_SEEDS, sample_seed

STALE = "stale"

Answer = Mapping[str, Any]
"""A stored rollout: prompt and tokens (lists of ids), logprobs (one per token), advantage."""
Remembered = Mapping[str, Any]
"""The stored fresh groups of a step: its number `step`, and `groups`, each a list of ``Answer``. Plain JSON."""


@dataclass(frozen=True, kw_only=True)
class ReMix(Method):
    settings: ReMixConfig = field(default_factory=ReMixConfig)

    rollout_terms: ClassVar[tuple[str, ...]] = (POLICY, STALE)

    def check(self, run: RunConfig) -> None:
        objective = run.objective
        if run.rollout.asynchronous is not None:
            raise ValueError(
                "rollout.asynchronous: method remix itself mixes rollouts of older weights with rollouts of the "
                "current policy; leave it out"
            )
        if run.rollout.carries:
            raise ValueError(
                "rollout.partial with unfinished: carry: method remix itself mixes rollouts of older weights with "
                "rollouts of the current policy, and a carried rollout is neither; leave rollout.partial out, or set "
                "unfinished: drop"
            )
        if objective.surrogate != "ppo" or objective.dual_clip is not None:
            raise ValueError(
                "method remix clips stale tokens around pi_k / pi_{k-i}, which is defined for objective.surrogate: "
                "ppo without objective.dual_clip"
            )

    def collect(self, context: StepContext) -> Collected:
        step, count = context.now.step, context.batch.prompts
        memory: Sequence[Remembered] = context.memory or []
        wanted = (
            num_stale(context.seed, step, count, self.settings.stale_share)
            if step < self.settings.mix_steps
            else 0
        )
        stale = choose_stale(memory, context.seed, step, wanted)
        groups: Sequence[RolloutGroup] = []
        stats: dict[str, Any] = {}
        if len(stale) < count:
            sampled = sample_groups(context, prompts=count - len(stale))
            groups, stats = sampled.groups, dict(sampled.stats)
        will_mix = step + 1 < self.settings.mix_steps
        return Collected(
            samples=policy_samples(groups, context.objective) + stale_samples(stale, step),
            weights={POLICY: 1.0, STALE: 1.0},
            stats={**stats, "stale_groups": len(stale)},
            memory=remember(memory, groups, step, self.settings.lag, context.objective) if will_mix else None,
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        fresh = policy_term(objective)

        def loss(stats: TokenStats, tokens: TermTokens) -> TermOutput:
            return stale_loss(stats, tokens, objective)

        return {POLICY: fresh, STALE: replace(fresh, loss=loss, scored=fresh.scored | {"old_logprob"})}


def num_stale(seed: int, step: int, count: int, share: float) -> int:
    """The number of stale groups among a step's ``count`` groups. Each is stale with probability ``share``."""
    return sum(sample_seed(seed, f"remix/stale/{step}", slot) < share * NUM_SEEDS for slot in range(count))


def choose_stale(
    memory: Sequence[Remembered], seed: int, step: int, wanted: int
) -> list[tuple[int, Sequence[Answer]]]:
    """Choose ``wanted`` stored groups, or all if there are fewer. Each is returned with the step that sampled it.

    A group occurs at most once in a step. It may be chosen again in a later step.
    """
    groups = [(entry["step"], group) for entry in memory for group in entry["groups"]]
    order = sorted(range(len(groups)), key=lambda i: sample_seed(seed, f"remix/choice/{step}", i))
    return [groups[i] for i in sorted(order[:wanted])]


def remember(
    memory: Sequence[Remembered],
    groups: Sequence[RolloutGroup],
    step: int,
    lag: int,
    objective: ObjectiveConfig,
) -> list[Remembered]:
    """The groups that the next step may choose from: the trained fresh rollouts of the last ``lag`` steps."""
    kept = [remembered_group(group, objective) for group in groups]
    here: Remembered = {"step": step, "groups": [answers for answers in kept if answers]}
    return [entry for entry in [*memory, here] if entry["step"] > step - lag]


def remembered_group(group: RolloutGroup, objective: ObjectiveConfig) -> list[Answer]:
    """The group in the form in which it is stored, with the rollouts that ``policy_samples`` would train."""
    if not group_is_trained(group, objective):
        return []
    return [
        {
            "prompt": list(group.prompt.token_ids),
            "tokens": list(rollout.token_ids),
            "logprobs": list(rollout.logprobs),
            "advantage": advantage,
            **({"routes": rollout.routes} if rollout.routes is not None else {}),
        }
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        if rollout_is_trained(rollout, objective)
    ]


def stale_samples(chosen: Sequence[tuple[int, Sequence[Answer]]], step: int) -> list[TrainSample]:
    """Samples of the term ``stale`` for the chosen groups. ``stale_logprob`` is log pi_{k-i}, ``age`` is i."""
    return [
        TrainSample(
            token_ids=np.array([*answer["prompt"], *answer["tokens"]], np.int64),
            parts=(
                Part(
                    term=STALE,
                    positions=len(answer["prompt"]) + np.arange(len(answer["tokens"])),
                    constants={
                        "stale_logprob": np.array(answer["logprobs"], np.float32),
                        "advantage": answer["advantage"],
                        "age": float(step - sampled_at),
                    },
                ),
            ),
            routes=answer.get("routes"),
        )
        for sampled_at, group in chosen
        for answer in group
    ]


def stale_loss(stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig) -> TermOutput:
    """-min(r A, clip(r, c - low, c + high) A) + KL penalty - entropy bonus, per stale token.

    Columns: advantage, stale_logprob (log pi_{k-i}), old_logprob (log pi_k), age; reference_logprob if ``kl`` is set.
    """
    advantages, sampled = tokens["advantage"], tokens["stale_logprob"]
    ratio = (stats.logprobs - sampled).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    centre = (tokens["old_logprob"] - sampled).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    within = ratio.clamp(centre - objective.clip_low, centre + objective.clip_high)
    loss = -torch.minimum(ratio * advantages, within * advantages)
    losses = {"stale_loss": loss.detach()}
    means = {
        "stale_clip_fraction": (within * advantages < ratio * advantages).float(),
        "stale_ratio": ratio.detach(),
        "stale_age": tokens["age"],
    }
    loss, kl = with_penalties(loss, stats, tokens, objective)
    if kl is not None:
        means["stale_kl"] = kl
    return TermOutput(loss, losses, means, {})
