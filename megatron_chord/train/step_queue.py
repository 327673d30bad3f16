"""The steps whose rollouts and demonstrations are being collected, or are collected and not trained on yet.

Without ``rollout.asynchronous`` a step is collected when it is started. With it, one thread of rank 0 collects the
steps one after another, in their order, because each step draws its prompts where the step before has stopped. Which
steps are in the queue depends on the settings alone, so all ranks agree on it without a message.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.schedules import ScheduleInput
from megatron_chord.train.coordinator import Coordinator, StepInputs

CollectedStep = tuple[StepInputs, tuple[Sequence[PackedBatch], ...]]
"""A step's inputs, and this data-parallel rank's micro-batches of each update."""
_OfAllRanks = tuple[StepInputs, list[tuple[Sequence[PackedBatch], ...]]]


class StepQueue:
    """Every method but ``close`` is called on every rank. A failure of the coordinator is raised on all of them."""

    def __init__(self, run: RunConfig, groups: ParallelGroups, coordinator: Coordinator | None) -> None:
        self._run = run
        self._groups = groups
        self._coordinator = coordinator
        self._steps: dict[int, Future[_OfAllRanks] | None] = {}
        """By step. Only the coordinator has futures."""
        self._generation = 0
        self._thread: ThreadPoolExecutor | None = None
        if coordinator is not None and run.rollout.max_off_policy_steps > 0:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling-ahead")

    def not_started(self, now: ScheduleInput, *, through: int) -> list[ScheduleInput]:
        """The steps of the run from ``now`` to ``through`` (included) that are not in the queue, in order."""
        last = min(through, self._run.steps - 1)
        return [replace(now, step=step) for step in range(now.step, last + 1) if step not in self._steps]

    def start(self, step: ScheduleInput, clients: Sequence[RolloutClient], *, version: int) -> None:
        """Collect ``step`` with these servers, which hold weight version ``version``; with none, it samples nothing."""
        self._steps[step.step] = None
        if self._thread is not None:
            self._steps[step.step] = self._thread.submit(self._collect, step, clients, version)
        elif self._coordinator is not None:
            future: Future[_OfAllRanks] = Future()
            try:
                future.set_result(self._collect(step, clients, version))
            except Exception as error:  # ``wait`` raises it, on every rank
                future.set_exception(error)
            self._steps[step.step] = future

    def wait(self, step: int) -> CollectedStep:
        """What ``step`` was collected from and to. Raises what its collection has raised."""

        def collected() -> _OfAllRanks:
            future = self._steps[step]
            assert future is not None
            return future.result()

        return self._groups.from_coordinator(collected)

    def remove(self, step: int) -> None:
        """Forget ``step``, which is trained on now."""
        del self._steps[step]

    def forget_lost(self, generation: int) -> None:
        """Forget the steps that rollout servers had not finished when they were lost.

        Args:
            generation: how many servers have been replaced. Nothing is forgotten while the number stays the same.
        """
        if self._generation == generation:
            return

        def finished() -> list[int]:
            concurrent.futures.wait([future for future in self._steps.values() if future is not None])
            return [
                step
                for step, future in self._steps.items()
                if future is not None and future.exception() is None
            ]

        kept = self._groups.once(finished)
        self._steps = {step: self._steps[step] for step in kept}
        self._generation = generation

    def drain(self) -> None:
        """Wait until nothing is being sampled. ``wait`` raises what failed, when its step comes."""

        def wait() -> None:
            concurrent.futures.wait([future for future in self._steps.values() if future is not None])

        if self._steps:
            self._groups.once(wait)

    def restore(self, run_state: Mapping[str, Any]) -> None:
        """Put the steps into the queue whose rollouts a checkpoint holds. Without a lag they are sampled again.

        Raises:
            ValueError: they were sampled under other settings.
        """
        if self._run.rollout.max_off_policy_steps == 0:
            return
        for record in run_state.get("ahead", ()):
            step = ScheduleInput(step=record["step"], seed=self._run.seed, memory=run_state["mu"])
            if step.step >= self._run.steps:
                break
            self._steps[step.step] = None
            self._groups.once(lambda step=step, record=record: self._collect_recorded(step, record))

    def close(self) -> None:
        """Start nothing more. What is being collected ends when its clients and graders are closed."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _collect(self, step: ScheduleInput, clients: Sequence[RolloutClient], version: int) -> _OfAllRanks:
        assert self._coordinator is not None
        return self._coordinator.collect(step, clients, version)

    def _collect_recorded(self, step: ScheduleInput, record: Mapping[str, Any]) -> None:
        assert self._coordinator is not None
        future: Future[_OfAllRanks] = Future()
        try:
            future.set_result(
                self._coordinator.collect(step, [], record["version"], recorded=record["calls"])
            )
        except ValueError as error:
            raise ValueError(
                f"the checkpoint holds rollouts of step {step.step}, sampled ahead under other settings: {error}. "
                "Resume with the run's own settings, or with rollout.asynchronous=null, which samples the step anew"
            ) from error
        self._steps[step.step] = future
