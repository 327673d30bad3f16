"""Prefix-RFT (arXiv 2507.01679; code ZeroYuHuang/prefix_rft): some answers begin with a part of the demonstration.

Each prompt has K answers. ``hybrids`` of them begin with the first L = floor(l |y*|) tokens of the prompt's
demonstration y*, and the policy samples the rest. l ~ U(low, ``high``), and low decreases from ``low_start`` to
``low_end`` along half a cosine.

    unprefixed rollouts   A by objective.advantage, over the group of unprefixed rollouts
    continuation          A = R_hybrid: a group of one, with mean 0 and std 1
    prefix                A = (R_hybrid - mean R_unprefixed) / hybrids

Prefix tokens are trained by the same surrogate. Their ratio uses the policy's log-prob l in numerator and denominator,
never the author's: it is exp(l - sg(l)), or with ``ratio_from: recomputed`` exp(l - log-prob before the step). Only the
``entropy_share`` of prefix tokens with the highest entropy keep their advantage. The advantage of the others is set to
0, but they still count in the denominators.

Differences from the authors' code: The entropy threshold is computed over the whole update and not over a micro-batch,
because that would depend on the packing. KL penalty, entropy bonus and importance correction do not apply to prefix
tokens, because these were not sampled. Several hybrids of one prompt share one prefix, and their continuations form a
group by ``objective.advantage``, as in the code; but their prefix's advantage is computed from the reward, and in the
code from the normalised reward. When sequences are averaged, a hybrid's prefix and its continuation count as two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from megatron_chord.config import BatchConfig, ObjectiveConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import PrefixRFTConfig
from megatron_chord.losses.policy import group_advantages, surrogate
from megatron_chord.losses.sft import most_uncertain
from megatron_chord.losses.terms import Prepare, Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, averaged_term, policy_term
from megatron_chord.methods.groups import POLICY, policy_samples, rollout_is_trained, sample_groups
from megatron_chord.records import GradedRollouts, Part, Prompt, Rollout, RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.sampling.rounds import NUM_SEEDS, sample_seed
from megatron_chord.schedules import ScheduleInput, WarmupCosine

PREFIX = "prefix"


@dataclass(frozen=True, kw_only=True)
class PrefixRFT(Method):
    settings: PrefixRFTConfig = field(default_factory=PrefixRFTConfig)

    needs_demonstrations: ClassVar[bool] = True

    def max_sampling_rounds(self, batch: BatchConfig) -> int:
        return super().max_sampling_rounds(batch) + 1

    def check(self, run: RunConfig) -> None:
        if run.batch.rollouts - self.settings.hybrids < 2:
            raise ValueError(
                f"batch.rollouts {run.batch.rollouts} minus method.hybrids {self.settings.hybrids} leaves a group of "
                f"{run.batch.rollouts - self.settings.hybrids} unprefixed rollouts; at least 2 are needed"
            )

    def lowest_share(self, now: ScheduleInput, *, steps: int) -> float:
        """``low`` at this step of ``steps``: the smallest share of a demonstration that a hybrid may begin with."""
        decay = WarmupCosine(
            peak=self.settings.low_start,
            valley=self.settings.low_end,
            decay_steps=self.settings.decay_steps or steps,
        )
        return decay.value(now)

    def collect(self, context: StepContext) -> Collected:
        lowest = self.lowest_share(context.now, steps=context.num_steps)
        sampled = sample_groups(context, rollouts=context.batch.rollouts - self.settings.hybrids)
        demonstrations = [context.demonstration(item.prompt) for item in sampled.drawn]
        shares = [
            prefix_share(context.seed, item.position, low=lowest, high=self.settings.high)
            for item in sampled.drawn
        ]
        hybrids = context.rollouts(
            sampled.drawn,
            num_rollouts=self.settings.hybrids,
            attempt="hybrid",
            prefixes=[prefix_of(*pair) for pair in zip(demonstrations, shares, strict=True)],
        )
        samples = policy_samples(sampled.groups, context.objective)
        samples += hybrid_samples(
            hybrids, sampled.groups, hybrids_per_prompt=self.settings.hybrids, objective=context.objective
        )
        stats = {"prefix_low": lowest, **hybrid_stats(hybrids, [len(answer) for answer in demonstrations])}
        return Collected(
            samples=samples, weights={POLICY: 1.0, PREFIX: 1.0}, stats={**sampled.stats, **stats}
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        scored = {"old_entropy"} | ({"old_logprob"} if objective.ratio_from == "recomputed" else set())
        return {
            POLICY: policy_term(objective),
            PREFIX: averaged_term(
                objective,
                lambda stats, tokens: prefix_loss(stats, tokens, objective),
                pool=POLICY,
                scored=scored,
                prepare=keep_most_uncertain(self.settings.entropy_share),
            ),
        }


# ---- the prefix of a demonstration


def prefix_share(seed: int, position: int, *, low: float, high: float) -> float:
    """l ~ U(low, high): a pure function of the run's seed and the prompt's position in the order of draws."""
    return low + (high - low) * sample_seed(seed, "prefix", position) / NUM_SEEDS


def prefix_of(demonstration: Sequence[int], share: float) -> tuple[int, ...]:
    """The first floor(share x length) tokens, but always fewer than all."""
    length = min(math.floor(share * len(demonstration)), len(demonstration) - 1)
    return tuple(demonstration[:length])


# ---- samples


def hybrid_samples(
    hybrids: Sequence[GradedRollouts],
    groups: Sequence[RolloutGroup],
    *,
    hybrids_per_prompt: int,
    objective: ObjectiveConfig,
) -> list[TrainSample]:
    """A sample for each hybrid whose grading succeeded: its prefix is trained under ``prefix``, the rest under
    ``policy``.

    Args:
        groups: the groups of unprefixed rollouts of the same prompts, in the same order.
    """
    kept = [
        [
            (rollout, reward)
            for rollout, reward in zip(item.rollouts, item.rewards, strict=True)
            if reward is not None
        ]
        for item in hybrids
    ]
    continued = continuation_advantages([[reward for _, reward in pairs] for pairs in kept], objective)
    return [
        hybrid_sample(
            item.prompt,
            item.prefix,
            rollout,
            prefix_advantage=(reward - statistics.fmean(group.rewards)) / hybrids_per_prompt,
            advantage=advantage,
        )
        for item, group, pairs, advantages in zip(hybrids, groups, kept, continued, strict=True)
        for (rollout, reward), advantage in zip(pairs, advantages, strict=True)
        if rollout_is_trained(rollout, objective)
    ]


def continuation_advantages(
    rewards: Sequence[Sequence[float]], objective: ObjectiveConfig
) -> list[tuple[float, ...]]:
    """Advantages of each prompt's hybrids.

    A single hybrid has its reward as advantage. Several hybrids form a group, with advantages by
    ``objective.advantage``.
    """
    several = iter(
        group_advantages(
            [group for group in rewards if len(group) > 1],
            kind=objective.advantage,
            eps=objective.advantage_eps,
        )
    )
    return [next(several) if len(group) > 1 else tuple(group) for group in rewards]


def hybrid_sample(
    prompt: Prompt, prefix: Sequence[int], rollout: Rollout, *, prefix_advantage: float, advantage: float
) -> TrainSample:
    """A sample of prompt, prefix and continuation."""
    start = len(prompt.token_ids)
    middle = start + len(prefix)
    stop = middle + len(rollout.token_ids)
    return TrainSample(
        token_ids=np.array([*prompt.token_ids, *prefix, *rollout.token_ids], np.int64),
        parts=(
            Part(term=PREFIX, positions=np.arange(start, middle), constants={"advantage": prefix_advantage}),
            Part(
                term=POLICY,
                positions=np.arange(middle, stop),
                constants={"rollout_logprob": np.array(rollout.logprobs, np.float32), "advantage": advantage},
            ),
        ),
        routes=rollout.routes,
    )


def hybrid_stats(hybrids: Sequence[GradedRollouts], lengths: Sequence[int]) -> dict[str, float]:
    """Metrics of the hybrids. ``lengths`` is the number of tokens of each prompt's demonstration."""
    rewards = [reward for item in hybrids for reward in item.rewards if reward is not None]
    shares = [len(item.prefix) / length for item, length in zip(hybrids, lengths, strict=True)]
    return {
        "prefix_share": statistics.fmean(shares),
        **({"hybrid_reward_mean": statistics.fmean(rewards)} if rewards else {}),
    }


# ---- the prefix's loss


def prefix_loss(stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig) -> TermOutput:
    """``objective``'s surrogate per prefix token.

    Columns: advantage, kept; old_logprob if ``ratio_from`` is `recomputed`.
    """
    logprobs, kept = stats.logprobs, tokens["kept"]
    old = tokens["old_logprob"] if objective.ratio_from == "recomputed" else logprobs.detach()
    filtered = replace(tokens, columns={**tokens.columns, "advantage": tokens["advantage"] * kept})
    loss, clipped, *_ = surrogate(logprobs, old, filtered, objective)
    means = {
        "prefix_nll": -logprobs.detach(),
        "prefix_entropy": stats.entropy.detach(),
        "prefix_kept": kept,
        "prefix_clip_fraction": clipped.float(),
    }
    return TermOutput(loss, {"prefix_loss": loss.detach()}, means, {})


def keep_most_uncertain(share: float) -> Prepare:
    """Make the column ``kept``: 1 for the ``share`` of the update's tokens with the highest ``old_entropy``, else 0."""
    return most_uncertain("kept", share)
