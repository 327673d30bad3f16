"""Prefix-RFT (arXiv 2507.01679; code ZeroYuHuang/prefix_rft): some answers begin with a part of the demonstration.

Of each prompt's K answers, ``hybrids`` begin with the first L = floor(l |y*|) tokens of its demonstration y* and are
continued by the policy; l ~ U(low, ``high``), and low falls from ``low_start`` to ``low_end`` along half a cosine.

    unprefixed rollouts   A by objective.advantage; a group of their own
    continuation          A = R_hybrid; a group of one, mean 0 and std 1
    prefix                A = (R_hybrid - mean R_unprefixed) / hybrids

A prefix token is trained by the same surrogate, its ratio taken against the policy's own log-prob, never the author's:
exp(l - sg l), or against the log-prob before the step with ``ratio_from: recomputed``. Only the ``entropy_share`` of
prefix tokens with the highest entropy keep their advantage, the others' is 0; they still count in the denominators.

What differs from the code: the entropy threshold is that of the whole update, not of a micro-batch, since it would
change with the packing. Prefix tokens were not sampled, so KL penalty, entropy bonus and importance correction leave
them out. Several hybrids of a prompt share one prefix and are a group by ``objective.advantage`` (as in the code, where
their prefix's advantage is then taken from the normalised reward; here from the reward itself). Where sequences are
averaged, a hybrid's prefix and its continuation are two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from megatron_chord.config import ObjectiveConfig, RunConfig
from megatron_chord.config_methods import PrefixRFTConfig
from megatron_chord.losses.policy import group_advantages, surrogate
from megatron_chord.losses.sft import most_uncertain
from megatron_chord.losses.terms import Prepare, Term, TermOutput, TermTokens, TokenStats
from megatron_chord.methods.base import Collected, Method, averaged_term, policy_term
from megatron_chord.methods.groups import POLICY, policy_samples, rollout_is_trained, sample_groups
from megatron_chord.records import Part, Prompt, Rollout, RolloutGroup, TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.sampling.rounds import GradedRollouts, sample_seed
from megatron_chord.schedules import ScheduleInput, WarmupCosine

PREFIX = "prefix"


@dataclass(frozen=True, kw_only=True)
class PrefixRFT(Method):
    settings: PrefixRFTConfig = field(default_factory=PrefixRFTConfig)

    needs_demonstrations: ClassVar[bool] = True

    def max_sampling_rounds(self, run: RunConfig) -> int:
        return super().max_sampling_rounds(run) + 1

    def check(self, run: RunConfig) -> None:
        if run.batch.rollouts - self.settings.hybrids < 2:
            raise ValueError(
                f"batch.rollouts {run.batch.rollouts} less method.hybrids {self.settings.hybrids} leaves a group of "
                f"{run.batch.rollouts - self.settings.hybrids} unprefixed rollouts; it needs 2"
            )

    def lowest_share(self, now: ScheduleInput, run: RunConfig) -> float:
        """The least share of its demonstration that a prompt's hybrids may begin with at this step."""
        decay = WarmupCosine(
            peak=self.settings.low_start,
            valley=self.settings.low_end,
            decay_steps=self.settings.decay_steps or run.steps,
        )
        return decay.value(now)

    def collect(self, context: StepContext, run: RunConfig) -> Collected:
        lowest = self.lowest_share(context.now, run)
        unprefixed = replace(
            run, batch=replace(run.batch, rollouts=run.batch.rollouts - self.settings.hybrids)
        )
        sampled = sample_groups(context, unprefixed)
        demonstrations = [context.demonstration(item.prompt) for item in sampled.drawn]
        shares = [
            prefix_share(run.seed, item.position, low=lowest, high=self.settings.high)
            for item in sampled.drawn
        ]
        hybrids = context.rollouts(
            sampled.drawn,
            samples=self.settings.hybrids,
            attempt="hybrid",
            prefixes=[prefix_of(*pair) for pair in zip(demonstrations, shares, strict=True)],
        )
        samples = policy_samples(sampled.groups, run.objective)
        samples += hybrid_samples(
            hybrids, sampled.groups, hybrids_per_prompt=self.settings.hybrids, objective=run.objective
        )
        stats = {"prefix_low": lowest, **hybrid_stats(hybrids, [len(answer) for answer in demonstrations])}
        return Collected(
            samples=samples, weights={POLICY: 1.0, PREFIX: 1.0}, stats={**sampled.stats, **stats}
        )

    def terms(self, run: RunConfig) -> dict[str, Term]:
        objective = run.objective
        scored = {"old_entropy"} | ({"old_logprob"} if objective.ratio_from == "recomputed" else set())
        return {
            POLICY: policy_term(run),
            PREFIX: averaged_term(
                run,
                lambda stats, tokens: prefix_loss(stats, tokens, objective),
                pool=POLICY,
                scored=scored,
                prepare=keep_most_uncertain(self.settings.entropy_share),
            ),
        }


# ---- which tokens are given


def prefix_share(seed: int, position: int, *, low: float, high: float) -> float:
    """l ~ U(low, high): a pure function of the run's seed and the prompt's place in the order of prompts."""
    return low + (high - low) * sample_seed(seed, "prefix", position) / 2**62


def prefix_of(demonstration: Sequence[int], share: float) -> tuple[int, ...]:
    """The first floor(share x length) tokens; never all of them."""
    length = min(math.floor(share * len(demonstration)), len(demonstration) - 1)
    return tuple(demonstration[:length])


# ---- what is trained


def hybrid_samples(
    hybrids: Sequence[GradedRollouts],
    groups: Sequence[RolloutGroup],
    *,
    hybrids_per_prompt: int,
    objective: ObjectiveConfig,
) -> list[TrainSample]:
    """Every hybrid that was graded: its prefix under the term ``prefix``, its continuation under ``policy``.

    Args:
        groups: of the unprefixed rollouts of the same prompts, in the same order.
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
    """Of each prompt's hybrids: a single one's is its reward; several of one prefix are a group like any other."""
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
    """Prompt, prefix, continuation."""
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
    )


def hybrid_stats(hybrids: Sequence[GradedRollouts], lengths: Sequence[int]) -> dict[str, float]:
    """``lengths``: tokens of each prompt's demonstration."""
    rewards = [reward for item in hybrids for reward in item.rewards if reward is not None]
    shares = [len(item.prefix) / length for item, length in zip(hybrids, lengths, strict=True)]
    return {
        "prefix_share": statistics.fmean(shares),
        **({"hybrid_reward_mean": statistics.fmean(rewards)} if rewards else {}),
    }


# ---- the prefix's loss


def prefix_loss(stats: TokenStats, tokens: TermTokens, objective: ObjectiveConfig) -> TermOutput:
    """``objective``'s surrogate per prefix token. Columns: advantage, kept; old_logprob with ``recomputed``."""
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
    """The column ``kept``: 1 for the ``share`` of the update's tokens with the highest ``old_entropy``, else 0."""
    return most_uncertain("kept", share)
