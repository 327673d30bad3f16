"""What rank 0 alone does: draw prompts and demonstrations, have them sampled and graded, and plan the step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.cursor import Cursor
from megatron_chord.data.packing import Layout, PackedBatch, plan_step
from megatron_chord.losses.objective import StepWeights
from megatron_chord.records import RolloutGroup
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.collect import (
    GradedRollouts,
    Sampling,
    TooManyGraderErrors,
    expert_samples,
    grade,
    make_groups,
    policy_samples,
    sample,
    sample_seed,
)
from megatron_chord.train.evaluate import Evaluation, evaluate
from megatron_chord.train.metrics import RunLog, Timer
from megatron_chord.train.setup import RunData


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What every rank is told of a step, beside its own micro-batches."""

    weights: StepWeights
    stats: dict[str, Any]
    """The sampling's part of the step's metrics row."""
    seconds: dict[str, float]
    """Of each phase of the collection."""
    num_tokens: int
    """All tokens of the step's samples, prompts included."""


@dataclass(frozen=True, kw_only=True)
class _Cursors:
    prompts: Cursor
    experts: Cursor | None


class Coordinator:
    def __init__(
        self, run: RunConfig, data: RunData, *, layout: Layout, graders: GraderPool, log: RunLog
    ) -> None:
        self._run = run
        self._data = data
        self._layout = layout
        self._graders = graders
        self.log = log
        self._cursors = _Cursors(prompts=data.prompt_cursor, experts=data.expert_cursor)
        self._after = self._cursors

    # ---- cursors: a step's draws count only once the step is done

    def commit(self) -> None:
        """The step that was collected last has been trained on."""
        self._cursors = self._after

    def run_state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` optimizer steps keeps beside weights and optimizer."""
        experts = self._cursors.experts
        return {
            "step": step,
            "cursors": {
                "prompts": self._cursors.prompts.state(),
                "experts": experts.state() if experts is not None else None,
            },
        }

    def restore(self, run_state: dict[str, Any]) -> None:
        """Take the data up where a checkpoint left it. ValueError when the data are not the same."""
        saved = run_state["cursors"]
        experts = self._cursors.experts
        if (experts is None) != (saved["experts"] is None):
            raise ValueError("data.experts was added or removed since the checkpoint was written")
        self._cursors = _Cursors(
            prompts=self._cursors.prompts.restored(saved["prompts"]),
            experts=experts.restored(saved["experts"]) if experts is not None else None,
        )
        self._after = self._cursors

    # ---- one step

    def collect(
        self, step: int, mu: float, clients: Sequence[RolloutClient], version: int
    ) -> tuple[StepInputs, Sequence[Sequence[PackedBatch]]]:
        """The inputs of optimizer step ``step`` and the micro-batches of every data-parallel rank.

        At mu = 1 nothing is sampled, at mu = 0 no demonstration is drawn. May be repeated: it draws the same.
        """
        run, timer = self._run, Timer()
        num_prompts = run.batch.prompts if mu < 1 else 0
        chosen, prompt_cursor = self._cursors.prompts.take(num_prompts)
        groups: list[RolloutGroup] = []
        stats: dict[str, Any] = {}
        if num_prompts:
            graded = self._sample_and_grade(step, chosen, clients, version, timer)
            groups = make_groups(graded, use_std=run.objective.advantage_std, eps=run.objective.advantage_eps)
            if not groups:
                raise TooManyGraderErrors(f"step {step}: no prompt has two rollouts whose grading succeeded")
            stats = _rollout_stats(graded, groups)
            self.log.write_samples(step, _sample_rows(graded))
        demonstrations, expert_cursor = self._draw_experts(run.batch.experts if mu > 0 else 0)
        self._after = _Cursors(prompts=prompt_cursor, experts=expert_cursor)
        with timer.phase("pack"):
            samples = policy_samples(groups) + expert_samples(demonstrations)
            plan = plan_step(samples, max_tokens=run.batch.max_tokens, layout=self._layout, pad_id=0)
        weights = StepWeights(
            mu=mu,
            num_policy_tokens=plan.num_policy_tokens,
            num_expert_tokens=plan.num_expert_tokens,
        )
        inputs = StepInputs(
            weights=weights,
            stats=stats,
            seconds=timer.seconds,
            num_tokens=sum(len(sample.token_ids) for sample in samples),
        )
        return inputs, plan.micro_batches

    def evaluate(self, clients: Sequence[RolloutClient], version: int) -> Evaluation:
        result, graded = evaluate(
            self._run,
            self._data.problems,
            clients,
            template=self._data.template,
            graders=self._graders,
            version=version,
        )
        self.log.write_samples(version, _sample_rows(graded), kind="evaluation")
        return result

    def _draw_experts(self, count: int) -> tuple[list[Any], Cursor | None]:
        cursor = self._cursors.experts
        if cursor is None or count == 0:
            return [], cursor
        chosen, cursor = cursor.take(count)
        return [self._data.experts[index] for index in chosen], cursor

    def _sample_and_grade(
        self, step: int, chosen: Sequence[int], clients: Sequence[RolloutClient], version: int, timer: Timer
    ) -> list[GradedRollouts]:
        run = self._run
        prompts = [self._data.prompts[index] for index in chosen]
        sampling = Sampling(
            num_samples=run.batch.rollouts,
            temperature=run.rollout.temperature,
            max_tokens=run.data.max_response_tokens,
            stop_token_ids=self._data.template.stop_token_ids,
        )
        with timer.phase("sample"):
            sampled = sample(
                clients,
                prompts,
                sampling,
                seeds=[sample_seed(run.seed, step, index) for index in range(len(prompts))],
                version=version,
                deadline_s=run.rollout.request_timeout_s,
                on_done=lambda done: self.log.doing(f"sampling {done}/{len(prompts)} prompts"),
            )
        with timer.phase("grade"):
            self.log.doing("grading")
            return grade(
                prompts,
                sampled,
                template=self._data.template,
                graders=self._graders,
                max_error_rate=run.reward.max_error_rate,
            )


def _rollout_stats(graded: Sequence[GradedRollouts], groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for item in graded for rollout in item.rollouts]
    errors = sum(grade.error is not None for item in graded for grade in item.grades)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    return {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "equal_reward_groups": sum(min(g.rewards) == max(g.rewards) for g in groups) / len(groups),
        "dropped_groups": len(graded) - len(groups),
        "response_length": statistics.fmean(lengths),
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "grader_errors": errors,
    }


def _sample_rows(graded: Sequence[GradedRollouts]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": item.prompt.id,
            "prompt": item.prompt.messages[-1]["content"],
            "truth": item.prompt.truth,
            "response": text,
            "reward": grade.score,
            "grader_error": grade.error,
            "num_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
            "mean_logprob": math.fsum(rollout.logprobs) / max(len(rollout.logprobs), 1),
        }
        for item in graded
        for rollout, text, grade in zip(item.rollouts, item.texts, item.grades, strict=True)
    ]
