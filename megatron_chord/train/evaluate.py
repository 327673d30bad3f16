"""Accuracy on held-out problems, sampled and graded exactly as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_chord.config import RunConfig
from megatron_chord.data.templates import ChatTemplate
from megatron_chord.evaluation.metrics import bootstrap
from megatron_chord.records import Prompt
from megatron_chord.rewards.graders import Graders
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.sampling.rounds import (
    GradedRollouts,
    RolloutRequest,
    Sampling,
    TooManyGraderErrors,
    grade,
    part_means,
    sample,
    sample_seed,
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


def evaluate(
    run: RunConfig,
    problems: Sequence[Prompt],
    clients: Sequence[RolloutClient],
    *,
    template: ChatTemplate,
    graders: Graders,
    version: int,
) -> tuple[Evaluation, list[GradedRollouts]]:
    sampling = Sampling(
        num_samples=run.evaluation.samples,
        temperature=run.evaluation.temperature,
        max_tokens=run.data.max_response_tokens,
        stop_token_ids=template.stop_token_ids,
    )
    # Every evaluation uses the same seeds, so that two evaluations differ only by the weights.
    requests = [
        RolloutRequest(prompt=problem, seed=sample_seed(run.seed, "evaluation", index))
        for index, problem in enumerate(problems)
    ]
    sampled = sample(
        clients,
        requests,
        sampling,
        version=version,
        deadline_s=run.timeouts.sampling_s,
    )
    graded = grade(
        requests, sampled, template=template, graders=graders, max_error_rate=run.reward.max_error_rate
    )
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
    )
    return result, graded


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
