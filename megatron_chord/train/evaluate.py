"""Accuracy on held-out problems, sampled and graded exactly as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.evaluation.metrics import Graded, bootstrap, read_metric, value_of
from megatron_chord.records import GradedRollouts, Prompt, RolloutRequest
from megatron_chord.rewards.graders import Graders
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.sampling.rounds import (
    Grading,
    Sampling,
    TooManyGraderErrors,
    part_means,
    sample,
    sample_seed,
)


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """One set of held-out problems, and how its answers are sampled and measured."""

    name: str
    """Name of the set; empty for the problems of ``data.evaluation``."""
    every: int
    """Number of steps between its evaluations. 0: only before the first step and after the last step."""
    samples: int
    temperature: float
    metrics: tuple[str, ...] = ()


def held_out_sets(run: RunConfig) -> tuple[HeldOutSet, ...]:
    """All sets that a run evaluates, in the order of its settings."""
    settings = run.evaluation
    if settings.sets is None:
        whole = HeldOutSet(
            name="", every=settings.every, samples=settings.samples, temperature=settings.temperature
        )
        return (whole,) if run.data.evaluation is not None else ()
    found: list[HeldOutSet] = []
    for item in settings.resolved():
        assert item.every is not None
        assert item.samples is not None
        assert item.temperature is not None
        found.append(
            HeldOutSet(
                name=item.name,
                every=item.every,
                samples=item.samples,
                temperature=item.temperature,
                metrics=item.metrics,
            )
        )
    return tuple(found)


def due_sets(run: RunConfig, step: int) -> tuple[HeldOutSet, ...]:
    """The sets that are evaluated after ``step`` optimizer steps. Before the first step and after the last step these
    are all sets."""
    return tuple(
        held_out
        for held_out in held_out_sets(run)
        if step in (0, run.steps) or (held_out.every > 0 and step % held_out.every == 0)
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    accuracy: float
    """Mean score over problems and samples. Answers whose grading failed are left out."""
    num_problems: int
    num_errors: int
    response_length: float
    """Mean length of the answers, in tokens."""
    truncated: float
    """Share of the answers that were cut off at the length limit."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the accuracy over problems (``evaluation.metrics.bootstrap``)."""
    accuracy_by_source: dict[str, float] = field(default_factory=dict[str, float])
    """Accuracy of each source of ``data.evaluation``; empty if there is only one."""
    reward_terms: Mapping[str, float] = field(default_factory=dict[str, float])
    """Mean of every term of the reward and of its named parts; empty if the reward is a single number."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """The metrics that a set names, such as avg@8. Each is the mean over the problems whose answers were all
    graded."""

    def to_json(self) -> dict[str, Any]:
        """Its row in metrics.jsonl, with the named metrics beside the others."""
        row = asdict(self)
        return row | row.pop("metrics")


def evaluate(
    run: RunConfig,
    problems: Sequence[Prompt],
    clients: Sequence[RolloutClient],
    *,
    held_out: HeldOutSet,
    template: ChatTemplate,
    graders: Graders,
    version: int,
    check: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, list[GradedRollouts]]:
    """Sample and grade answers to the ``problems`` as ``held_out`` says.

    ``check`` is called about every second. Its exception ends the evaluation.

    Raises:
        TooManyGraderErrors: no answer could be graded, or more gradings failed than ``reward.max_error_rate`` allows.
        Exception: that of ``check``.
    """
    sampling = Sampling(
        num_rollouts=held_out.samples,
        temperature=held_out.temperature,
        max_tokens=run.data.max_response_tokens,
        stop_token_ids=template.stop_token_ids,
    )
    # Every evaluation uses the same seeds, so that two evaluations differ only by the weights.
    stream = f"evaluation/{held_out.name}" if held_out.name else "evaluation"
    requests = [
        RolloutRequest(prompt=problem, seed=sample_seed(run.seed, stream, index))
        for index, problem in enumerate(problems)
    ]
    with Grading(
        requests,
        template=template,
        graders=graders,
        max_error_rate=run.reward.max_error_rate,
        num_answers=len(requests) * sampling.num_rollouts,
    ) as grading:
        sampled = sample(
            clients,
            requests,
            sampling,
            version=version,
            deadline_s=run.timeouts.sampling_s,
            on_group=lambda index, rollouts, _: grading.add(index, rollouts),
            check=check,
        )
        graded = grading.finish(range(len(requests)), sampled, check=check)
    scores = [grade.score for item in graded for grade in item.grades if grade.score is not None]
    if not scores:
        raise TooManyGraderErrors(f"none of the evaluation's {len(problems)} problems could be graded")
    rollouts = [rollout for item in graded for rollout in item.rollouts]
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    bounds = bootstrap([_means(graded)], seed=run.seed)
    result = Evaluation(
        accuracy=sum(scores) / len(scores),
        num_problems=len(problems),
        num_errors=len(lengths) - len(scores),
        response_length=sum(lengths) / len(lengths),
        truncated=sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        interval=(bounds.low, bounds.high),
        accuracy_by_source=_by_source(graded),
        reward_terms=part_means(graded).get("reward_terms", {}),
        metrics=_metrics(graded, held_out.metrics),
    )
    return result, graded


def _metrics(graded: Sequence[GradedRollouts], names: Sequence[str]) -> dict[str, float]:
    """Mean of each metric over the problems that have it. A metric that no problem has is left out."""
    answers = [
        [Graded(grade.score, None) for grade in item.grades if grade.score is not None] for item in graded
    ]
    found: dict[str, float] = {}
    for name in names:
        metric = read_metric(name)
        values = [value for own in answers if (value := value_of(metric, own)) is not None]
        if values:
            found[name] = sum(values) / len(values)
    return found


def _means(graded: Sequence[GradedRollouts]) -> list[float]:
    """Mean score of each problem that has a score."""
    scores = [[grade.score for grade in item.grades if grade.score is not None] for item in graded]
    return [sum(own) / len(own) for own in scores if own]


def _by_source(graded: Sequence[GradedRollouts]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for item in graded:
        own = scores.setdefault(item.prompt.source, [])
        own += [grade.score for grade in item.grades if grade.score is not None]
    if len(scores) < 2:
        return {}
    return {source: sum(own) / len(own) for source, own in scores.items() if own}
