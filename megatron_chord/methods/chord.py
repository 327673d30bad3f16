"""CHORD (arXiv 2508.11408) and the methods that differ from it only in mu and in the weight of a demonstration token.

    L = (1 - mu) L_policy + mu L_SFT

SFT, GRPO, SFT-then-RL, alternating, constant mixing, CHORD-mu, CHORD-phi, IS-SFT (DFT), the reward-adaptive mixture,
SASR and GAC are all this method with different settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from megatron_chord.config import BatchConfig, ResolvedObjective, RunConfig
from megatron_chord.config_methods import ChordConfig
from megatron_chord.losses.noise import NUMBER, NoiseMeasurement
from megatron_chord.losses.sft import sft_term
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, Method, policy_term
from megatron_chord.methods.groups import POLICY, policy_samples, sample_groups
from megatron_chord.records import Demonstration, Part, TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.schedules import MuSchedule, NoiseAware, ScheduleInput

SFT = "sft"


@dataclass(frozen=True, kw_only=True)
class Chord(Method):
    settings: ChordConfig = field(default_factory=ChordConfig)

    draws_demonstrations: ClassVar[bool] = True

    def schedule(self) -> MuSchedule:
        return self.settings.mu

    def collect(self, context: StepContext) -> Collected:
        schedule, batch = self.settings.mu, context.batch
        stats: dict[str, Any] = {}
        samples: list[TrainSample] = []
        now, drawn = context.now, []
        if self.needs_rollouts_at(batch, now):
            sampled = sample_groups(context)
            drawn, stats = sampled.drawn, dict(sampled.stats)
            now = replace(now, reward_mean=sampled.reward_mean)
            samples = policy_samples(sampled.groups, context.objective)
        mu = schedule.value(now)
        if mu == 1:
            samples = []
        imitated: Sequence[Demonstration] = ()
        if mu > 0 and context.data.aligned:
            drawn = drawn or context.prompts(batch.demonstrations)
            chosen = [item.prompt.id for item in drawn[: batch.demonstrations]]
            imitated = [context.sources.demonstration_of[name] for name in chosen]
        elif mu > 0:
            imitated = context.demonstrations(batch.demonstrations)
        noise = self._noise(len(imitated)) if schedule.measures_noise(now.step) else None
        return Collected(
            samples=samples + sft_samples(imitated, are_numbered=noise is not None),
            weights={POLICY: 1 - mu, SFT: mu},
            mu=mu,
            stats=stats,
            noise=noise,
        )

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        return {
            POLICY: policy_term(objective),
            SFT: sft_term(
                weight=self.settings.token_weight,
                cutoff=self.settings.cutoff,
                temperature=self.settings.sft_temperature,
                aggregation=self.settings.aggregation,
                aggregation_length=objective.aggregation_length,
            ),
        }

    def _noise(self, demonstrations: int) -> NoiseMeasurement:
        uses_phi = self.settings.token_weight.kind == "phi"
        assert isinstance(self.settings.mu, NoiseAware)
        return NoiseMeasurement(demonstrations=demonstrations, uses_phi=uses_phi, trim=self.settings.mu.trim)

    def needs_rollouts_at(self, batch: BatchConfig, now: ScheduleInput) -> bool:
        schedule = self.settings.mu
        return batch.prompts > 0 and (schedule.needs_rewards or schedule.value(now) < 1)

    def uses_rollouts(self, batch: BatchConfig) -> bool:
        schedule = self.settings.mu
        return batch.prompts > 0 and (schedule.needs_rewards or schedule.bounds()[0] < 1)

    def check(self, run: RunConfig) -> None:
        schedule = self.settings.mu
        low, high = schedule.bounds()
        if high > 0 and run.data.demonstrations is None:
            raise ValueError("method.mu can be above 0 but data.demonstrations is not given")
        if high > 0 and run.batch.demonstrations == 0:
            raise ValueError("method.mu can be above 0 but batch.demonstrations is 0")
        if low < 1 and run.batch.prompts == 0:
            raise ValueError("method.mu can be below 1 but batch.prompts is 0")
        if low == 1 and run.objective.kl is not None:
            raise ValueError(
                "objective.kl belongs to the policy branch, but mu is 1 in every step; leave it out"
            )
        if schedule.needs_mu_gradient:
            if run.parallel.distributed_optimizer:
                raise ValueError(
                    "method.mu.rate needs the full gradient on every rank: set parallel.distributed_optimizer: false"
                )
            if run.batch.updates_per_step * run.batch.epochs > 1:
                raise ValueError(
                    "method.mu.rate needs one update per step: batch.updates_per_step and batch.epochs must be 1"
                )
        if schedule.measures_noise(0) and self.settings.token_weight.kind not in ("phi", "one"):
            raise ValueError(
                "method.mu 'noise_aware' compares the two branches with token_weight phi or one, got "
                f"{self.settings.token_weight.kind}"
            )
        end = min(run.steps, run.optim.horizon(run.steps))
        for step in filter(schedule.resets_optimizer, range(run.steps)):
            if run.optim.warmup_steps >= end - step:
                limit = f"optim.decay_steps {end}" if end < run.steps else str(end)
                raise ValueError(
                    f"optim.warmup_steps {run.optim.warmup_steps} leaves no step with the full learning rate after "
                    f"the optimizer's reset at step {step} of {limit}"
                )
        if run.data.aligned and run.batch.demonstrations > run.batch.prompts:
            raise ValueError(
                f"data.aligned: batch.demonstrations {run.batch.demonstrations} is more than batch.prompts "
                f"{run.batch.prompts}, but a step's demonstrations are those of its prompts"
            )


def sft_samples(demonstrations: Sequence[Demonstration], *, are_numbered: bool = False) -> list[TrainSample]:
    """A sample of the term ``sft`` for each demonstration; its only constant is NUMBER, if ``are_numbered``."""
    return [
        TrainSample(
            token_ids=np.array(demonstration.token_ids, np.int64),
            parts=(
                Part(
                    term=SFT,
                    positions=np.flatnonzero(demonstration.trainable),
                    constants={NUMBER: float(number)} if are_numbered else {},
                ),
            ),
        )
        for number, demonstration in enumerate(demonstrations)
    ]
