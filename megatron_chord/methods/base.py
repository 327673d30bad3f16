"""What a method is: how it mixes data, and the terms of its objective.

A method is a frozen dataclass that holds its settings (``config_methods``). Every step, the loop calls in this order:

    needs_rollouts_at   on every rank: will this step ask the rollout engine for anything?
    collect             on the coordinator: draw, sample, grade -> samples with their parts, and the terms' weights
    terms               the losses; they run on every rank of the last pipeline stage

``methods.table`` lists them; docs/methods.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from megatron_chord.config import CorrectionConfig, ObjectiveConfig, RunConfig
from megatron_chord.losses.policy import policy_loss
from megatron_chord.losses.terms import Prepare, Term, TermLoss
from megatron_chord.precision import preset
from megatron_chord.records import TrainSample
from megatron_chord.sampling.context import StepContext
from megatron_chord.schedules import MuSchedule, ScheduleInput


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One step's samples."""

    samples: Sequence[TrainSample]
    weights: Mapping[str, float]
    """Of each term in this step's objective."""
    mu: float | None = None
    """For methods that mix by it."""
    stats: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The method's part of the step's metrics row."""
    memory: Any = None
    """Plain JSON that the next step's ``StepContext.memory`` will be; saved in checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of the methods."""

    settings: Any
    """The block ``method`` of the run; each method narrows the type."""

    needs_demonstrations: ClassVar[bool] = False
    """Every prompt must have its own demonstration (``data.aligned``)."""
    draws_demonstrations: ClassVar[bool] = False
    """It trains on ``batch.demonstrations`` demonstrations a step; others take those of their prompts, if any."""

    @property
    def name(self) -> str:
        return self.settings.name

    def schedule(self, run: RunConfig) -> MuSchedule | None:
        """The schedule of mu, for methods that mix by it."""
        return None

    def check(self, run: RunConfig) -> None:
        """ValueError, with the rule that is broken, for settings that do not go together."""

    def uses_rollouts(self, run: RunConfig) -> bool:
        """Whether any step of the run asks the rollout engine for anything."""
        return True

    def step_text(self, run: RunConfig) -> str:
        """What one step is made of, for the printed plan."""
        own = ", each with its own demonstration" if self.needs_demonstrations else ""
        attempts = run.batch.sampling_attempts
        more = f", in up to {attempts} rounds of sampling" if attempts > 1 else ""
        return f"{run.batch.prompts} prompts x {run.batch.rollouts} rollouts{own}{more}"

    def needs_rollouts_at(self, run: RunConfig, now: ScheduleInput) -> bool:
        """Whether a step asks the rollout engine for anything; the same on every rank."""
        return True

    def max_sampling_rounds(self, run: RunConfig) -> int:
        """How often a step may ask the rollout engine in turn; for its deadline."""
        return run.batch.sampling_attempts

    def collect(self, context: StepContext, run: RunConfig) -> Collected:
        """The samples of one step. May be repeated after a server's death: it must draw the same."""
        raise NotImplementedError

    def terms(self, run: RunConfig) -> dict[str, Term]:
        """Every term that ``collect`` may use."""
        raise NotImplementedError


def policy_term(run: RunConfig) -> Term:
    """The on-policy branch by ``objective``'s settings."""
    objective = corrected(run)
    scored: set[str] = set()
    if objective.ratio_from == "recomputed":
        scored.add("old_logprob")
    if objective.kl is not None:
        scored.add("reference_logprob")
    has_penalties = objective.kl is not None or objective.entropy_bonus != 0
    return averaged_term(
        run,
        lambda stats, tokens: policy_loss(stats, tokens, objective),
        pool="policy",
        scored=scored,
        idle=None if has_penalties else "advantage",
    )


def corrected(run: RunConfig) -> ObjectiveConfig:
    """``objective`` as rollouts of older or of quantised weights need it: corrected, unless the user has said that it
    should not be.

    With ``ratio_from: rollout`` the ratio is the importance weight already.
    """
    objective = run.objective
    needs_correction = run.rollout.has_older_tokens or preset(run.precision).rollouts is not None
    if not needs_correction or objective.ratio_from == "rollout" or objective.correction is not None:
        return objective
    return replace(objective, correction=CorrectionConfig())


def averaged_term(
    run: RunConfig,
    loss: TermLoss,
    *,
    pool: str,
    scored: Iterable[str] = (),
    prepare: Prepare | None = None,
    idle: str | None = None,
) -> Term:
    """A loss averaged within ``pool`` as ``objective.aggregation`` says for the policy's tokens."""
    return Term(
        loss=loss,
        pool=pool,
        aggregation=run.objective.aggregation,
        aggregation_length=aggregation_length(run),
        scored=frozenset(scored),
        prepare=prepare,
        idle=idle,
    )


def aggregation_length(run: RunConfig) -> int:
    return run.objective.aggregation_length or run.data.max_response_tokens
