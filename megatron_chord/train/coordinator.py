"""What rank 0 alone does: have the method collect a step's samples, plan its updates, keep the cursors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import Layout, PackedBatch, plan_step
from megatron_chord.losses.aggregate import with_scales, without_idle
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Method
from megatron_chord.methods.draw import Draw, Engine, Sources
from megatron_chord.records import TrainSample
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.collect import GradedRollouts
from megatron_chord.schedules import Memory, Moment
from megatron_chord.timing import Timer
from megatron_chord.train.evaluate import Evaluation, evaluate
from megatron_chord.train.metrics import RunLog
from megatron_chord.train.setup import RunData
from megatron_chord.train.step import Update


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What every rank is told of a step, beside its own micro-batches."""

    updates: tuple[Update, ...]
    """The step's optimizer updates, one for each of ``batch.mini_batches``."""
    mu: float | None
    stats: Mapping[str, Any]
    """The sampling's part of the step's metrics row."""
    seconds: Mapping[str, float]
    """Of each phase of the collection."""
    num_tokens: int
    """All tokens that pass through the model, prompts included."""


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """What a step leaves to the next."""

    sources: Sources
    memory: Any


class Coordinator:
    def __init__(
        self,
        run: RunConfig,
        method: Method,
        data: RunData,
        *,
        layout: Layout,
        graders: GraderPool,
        log: RunLog,
    ) -> None:
        self._run = run
        self._method = method
        self._terms: Mapping[str, Term] = method.terms(run)
        self._data = data
        self._layout = layout
        self._graders = graders
        self.log = log
        self._progress = _Progress(sources=data.sources, memory=None)
        self._after = self._progress

    # ---- progress: a step's draws count only once the step is done

    def commit(self) -> None:
        """The step that was collected last has been trained on."""
        self._progress = self._after

    def run_state(self, step: int, mu_memory: Memory) -> dict[str, Any]:
        """What a checkpoint after ``step`` optimizer steps keeps beside weights and optimizer."""
        sources = self._progress.sources
        return {
            "step": step,
            "method": {"name": self._method.name, "memory": self._progress.memory},
            "mu": dict(mu_memory),
            "cursors": {
                "prompts": sources.prompt_cursor.state(),
                "experts": sources.expert_cursor.state() if sources.expert_cursor is not None else None,
            },
        }

    def restore(self, run_state: dict[str, Any]) -> None:
        """Take the data up where a checkpoint left it. ValueError when the data are not the same."""
        saved, sources = run_state["cursors"], self._progress.sources
        if (sources.expert_cursor is None) != (saved["experts"] is None):
            raise ValueError("data.experts was added or removed since the checkpoint was written")
        sources = replace(
            sources,
            prompt_cursor=sources.prompt_cursor.restored(saved["prompts"]),
            expert_cursor=sources.expert_cursor.restored(saved["experts"])
            if sources.expert_cursor is not None
            else None,
        )
        method = run_state["method"]
        memory = method["memory"] if method["name"] == self._method.name else None
        self._progress = self._after = _Progress(sources=sources, memory=memory)

    # ---- one step

    def collect(
        self, now: Moment, clients: Sequence[RolloutClient], version: int
    ) -> tuple[StepInputs, list[tuple[Sequence[PackedBatch], ...]]]:
        """The inputs of a step, and for every data-parallel rank each update's micro-batches.

        May be repeated: it draws the same.
        """
        run, timer = self._run, Timer()
        draw = Draw(
            run,
            Engine(clients=clients, version=version, template=self._data.template, graders=self._graders),
            self._progress.sources,
            now=now,
            memory=self._progress.memory,
            timer=timer,
            notify=self.log.doing,
        )
        collected = self._method.collect(draw, run)
        self._after = _Progress(sources=draw.sources, memory=collected.memory)
        if draw.graded:
            self.log.write_samples(now.step, _sample_rows(draw.graded))
        with timer.phase("pack"):
            count = run.batch.mini_batches
            scaled = [with_scales(collected.samples[index::count], self._terms) for index in range(count)]
            trained = [without_idle(samples, self._terms) for samples in scaled]
            plans = [
                plan_step(samples, max_tokens=run.batch.max_tokens, layout=self._layout, pad_id=0)
                for samples in trained
            ]
        inputs = StepInputs(
            updates=tuple(Update(weights=collected.weights, counts=plan.counts) for plan in plans),
            mu=collected.mu,
            stats={
                **collected.stats,
                **_rollout_stats(draw.graded),
                "idle_tokens": _num_tokens(scaled) - _num_tokens(trained),
            },
            seconds=timer.seconds,
            num_tokens=_num_tokens(trained),
        )
        return inputs, [
            tuple(plan.micro_batches[rank] for plan in plans) for rank in range(self._layout.data)
        ]

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


def _num_tokens(updates: Sequence[Sequence[TrainSample]]) -> int:
    """With their prompts."""
    return sum(len(sample.token_ids) for samples in updates for sample in samples)


def _rollout_stats(graded: Sequence[GradedRollouts]) -> dict[str, Any]:
    rollouts = [rollout for item in graded for rollout in item.rollouts]
    if not rollouts:
        return {}
    return {
        "response_length": statistics.fmean(len(rollout.token_ids) for rollout in rollouts),
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "grader_errors": sum(grade.error is not None for item in graded for grade in item.grades),
    }


def _sample_rows(graded: Sequence[GradedRollouts]) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": item.prompt.id,
            "prompt": item.prompt.messages[-1]["content"],
            "truth": item.prompt.truth,
            "response": text,
            "score": grade.score,
            "reward": reward,
            "grader_error": grade.error,
            "num_prefix_tokens": len(item.prefix),
            "num_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
            "mean_logprob": math.fsum(rollout.logprobs) / max(len(rollout.logprobs), 1),
        }
        for item in graded
        for rollout, text, grade, reward in zip(
            item.rollouts, item.texts, item.grades, item.rewards, strict=True
        )
    ]
