"""The base class of methods. A method says how a step mixes data, and which terms its objective has.

A method is a frozen dataclass that holds its settings (``config_methods``). Every step, the loop calls in this order:

    needs_rollouts_at   on every rank: does this step use the rollout engine?
    collect             on the coordinator: draw prompts, sample, grade; returns samples and the weights of the terms
    all_terms           the losses; they run on every rank of the last pipeline stage

``collect`` reads the run's other settings from its context. The other functions take the blocks that they read. Only
``check`` takes the whole run, because its rules compare blocks.
``methods.table`` lists the methods; docs/methods.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from megatron_chord.config import BatchConfig, DataConfig, ResolvedObjective, RunConfig
from megatron_chord.losses.noise import NoiseMeasurement
from megatron_chord.losses.policy import policy_loss
from megatron_chord.losses.terms import Prepare, Term, TermLoss
from megatron_chord.records import TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.schedules import MuSchedule, ScheduleInput


@dataclass(frozen=True, kw_only=True)
class ExtraUpdate:
    """The samples of an update that comes after the step's other updates, with an optimizer state of its own."""

    samples: Sequence[TrainSample]
    weights: Mapping[str, float]
    """Weight of each term in this update, by the term's name."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One step's samples."""

    samples: Sequence[TrainSample]
    weights: Mapping[str, float]
    """Weight of each term in this step's objective, by the term's name."""
    extra: ExtraUpdate | None = None
    """An extra update of this step; only methods with an ``extra_rate`` have one."""
    mu: float | None = None
    """The value of mu in this step; None for methods without mu."""
    stats: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The method's metrics of this step."""
    noise: NoiseMeasurement | None = None
    """What the step's first update measures for the schedule of mu. All samples then stay in that update, also those
    without a gradient."""
    memory: Any = None
    """Plain JSON. It becomes ``StepContext.memory`` of the next step and is saved in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the methods."""

    settings: Any
    """The settings of the run's ``method`` block. Each method narrows the type."""

    needs_demonstrations: ClassVar[bool] = False
    """True if every prompt must have its own demonstration (``data.aligned``)."""
    rollout_terms: ClassVar[tuple[str, ...]] = ("policy",)
    """The names of the terms whose tokens are rollouts."""
    draws_demonstrations: ClassVar[bool] = False
    """True if each step trains on ``batch.demonstrations`` demonstrations. If false, the method uses only the
    demonstrations that belong to the step's prompts, or none."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def uses_own_demonstrations(self) -> bool:
        """``needs_demonstrations``, or a rule of the method's settings."""
        return self.needs_demonstrations

    def schedule(self) -> MuSchedule | None:
        """The schedule of mu; None for methods without mu."""
        return None

    def check(self, run: RunConfig) -> None:
        """Check the method's settings against the rest of the run.

        Raises:
            ValueError: settings that contradict each other; the message names the rule.
        """

    def extra_rate(self) -> float | None:
        """The learning rate of extra updates (``Collected.extra``); None: no step has one."""
        return None

    def averaging_rate(self) -> float | None:
        """The rate of an average of the weights (``train.averaged``), which the scored column
        ``averaged_teacher_logprob`` needs; None: no average is kept."""
        return None

    def num_optimizer_states(self) -> int:
        """Number of optimizer states in a checkpoint: the run's, that of extra updates, and one with averaged
        weights."""
        return 1 + (self.extra_rate() is not None) + (self.averaging_rate() is not None)

    def check_positions(self, data: DataConfig, max_positions: int) -> None:
        """Check the lengths of sequences that only this method makes. ``max_positions`` is the model's limit.

        Raises:
            ValueError: a sequence could be longer than the model allows.
        """

    def uses_rollouts(self, batch: BatchConfig) -> bool:
        """True if any step of the run uses the rollout engine."""
        return True

    def needs_rollouts_at(self, batch: BatchConfig, now: ScheduleInput) -> bool:
        """True if this step uses the rollout engine. The result is the same on every rank."""
        return True

    def max_sampling_rounds(self, batch: BatchConfig) -> int:
        """The largest number of successive sampling rounds in a step. The step's deadline depends on it."""
        return batch.sampling_attempts

    def collect(self, context: StepContext) -> Collected:
        """Collect the samples of one step.

        The loop calls it again if a server fails during the step. Each call must draw the same prompts and
        demonstrations.
        """
        raise NotImplementedError

    def terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        """All terms that samples of ``collect`` may use, by name.

        Args:
            objective: the run's, with its defaults filled in (``RunConfig.resolved_objective``).
            batch: how many prompts and rollouts a step has.
        """
        raise NotImplementedError

    def all_terms(self, objective: ResolvedObjective, batch: BatchConfig) -> dict[str, Term]:
        """``terms``, with the entropy bonus of ``objective`` if that is averaged apart from the losses."""
        terms = self.terms(objective, batch)
        if not objective.averages_entropy_apart:
            return terms
        chosen = terms if objective.entropy_bonus_on == "all" else self.rollout_terms
        return terms | {
            name: replace(
                terms[name],
                entropy_bonus=objective.entropy_bonus,
                entropy_aggregation=objective.entropy_aggregation or objective.aggregation,
                aggregation_length=objective.aggregation_length,
                zero_gradient_column=None,
            )
            for name in chosen
        }


def refuse_dynamic_sampling(batch: BatchConfig, purpose: str) -> None:
    """Refuse dynamic sampling for a method that uses the prompts which it would replace. ``purpose`` is what the
    method does with them.

    Raises:
        ValueError: ``batch.sampling_attempts`` is above 1.
    """
    if batch.sampling_attempts > 1:
        raise ValueError(
            "batch.sampling_attempts: dynamic sampling would replace the prompts whose rollouts are all wrong, but "
            f"{purpose}; leave it at 1"
        )


def refuse_several_updates(batch: BatchConfig, name: str, *, also: str = "") -> None:
    """Refuse several updates per step for the method ``name``, whose loss compares pairs of answers.

    Raises:
        ValueError: ``batch.updates_per_step`` or ``batch.epochs`` is above 1. The message adds the reason ``also``.
    """
    if batch.updates_per_step > 1 or batch.epochs > 1:
        raise ValueError(
            f"method {name} takes one update per step: a pair's gradient is valid only for the weights "
            f"before the step's first update{also and f', and {also}'}. batch.updates_per_step is "
            f"{batch.updates_per_step} and batch.epochs is {batch.epochs}; set both to 1"
        )


def policy_term(objective: ResolvedObjective) -> Term:
    """The term of the on-policy branch, with the settings of ``objective``."""
    scored: set[str] = set()
    if objective.ratio_from == "recomputed":
        scored.add("old_logprob")
    if objective.kl is not None:
        scored.add("reference_logprob")
    has_penalties = objective.kl is not None or objective.entropy_bonus != 0
    return averaged_term(
        objective,
        lambda stats, tokens: policy_loss(stats, tokens, objective),
        pool="policy",
        scored=scored,
        zero_gradient_column=None if has_penalties else "advantage",
    )


def averaged_term(
    objective: ResolvedObjective,
    loss: TermLoss,
    *,
    pool: str,
    scored: Iterable[str] = (),
    prepare: Prepare | None = None,
    zero_gradient_column: str | None = None,
) -> Term:
    """A term with this loss. It is averaged within ``pool`` by ``objective.aggregation``, as the policy's tokens
    are."""
    return Term(
        loss=loss,
        pool=pool,
        aggregation=objective.aggregation,
        aggregation_length=objective.aggregation_length,
        scored=frozenset(scored),
        prepare=prepare,
        zero_gradient_column=zero_gradient_column,
    )
