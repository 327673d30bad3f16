"""Each step's inputs; with ``rollout.asynchronous`` those of later steps are sampled while a step trains.

One thread of rank 0 collects steps one after another, in their order, since each draws where the one before has
stopped. The ranks agree on what it has been told to do: which steps are under way depends on nothing but the settings.

    lag 1, drain   step t:  its inputs are there | push weights t | collect t+1 begins, and meanwhile: train on t
    lag n, keep    step t:  push weights t, under unfinished requests too | collect t+n is queued | wait for t | train

So with ``drain`` step t is sampled by weights t-1 whatever the timing, and a run can be repeated and resumed bit for
bit. A server that is lost takes with it what was unfinished; that is sampled anew, by the weights there are then.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.methods.base import Method
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.schedules import ScheduleInput
from megatron_chord.train.coordinator import Coordinator, StepInputs
from megatron_chord.train.engine import RolloutEngine
from megatron_chord.train.state import TrainState

Taken = tuple[StepInputs, tuple[Sequence[PackedBatch], ...]]
"""A step's inputs, and this data-parallel rank's micro-batches of each update."""
_Collected = tuple[StepInputs, list[tuple[Sequence[PackedBatch], ...]]]


class StepQueue:
    """Every method but ``close`` is called on every rank, and what fails on the coordinator is raised on all."""

    def __init__(
        self,
        run: RunConfig,
        method: Method,
        state: TrainState,
        engine: RolloutEngine,
        coordinator: Coordinator | None,
    ) -> None:
        self._run = run
        self._method = method
        self._state = state
        self._engine = engine
        self._coordinator = coordinator
        self._steps: dict[int, Future[_Collected] | None] = {}
        """Told to be collected and not trained yet; the futures are the coordinator's."""
        self._generation = engine.generation
        self._thread: ThreadPoolExecutor | None = None
        if coordinator is not None and run.rollout.max_off_policy_steps > 0:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling-ahead")

    def take(self, now: ScheduleInput) -> Taken:
        """The inputs of step ``now``; later ones are on their way when this returns."""
        if self._run.rollout.max_off_policy_steps > 0:
            return self._engine.attempt(lambda: self._take(now))
        if self._method.needs_rollouts_at(self._run, now):
            return self._engine.use(
                lambda clients, version: self._collect(now, clients, version), self._state, version=now.step
            )
        return self._state.groups.from_coordinator(lambda: self._collect(now, [], now.step))

    def drain(self) -> None:
        """Wait until nothing is being sampled. What failed is raised by ``take``, when its step comes."""

        def wait() -> None:
            concurrent.futures.wait([future for future in self._steps.values() if future is not None])

        if self._steps:
            self._state.groups.once(wait)

    def restore(self, run_state: Mapping[str, Any]) -> None:
        """Take up the steps that a checkpoint holds the rollouts of; without a lag they are sampled anew.

        Raises:
            ValueError: they were sampled under other settings.
        """
        if self._run.rollout.max_off_policy_steps == 0:
            return
        for record in run_state.get("ahead", ()):
            now = ScheduleInput(step=record["step"], seed=self._run.seed, memory=run_state["mu"])
            if now.step >= self._run.steps:
                break
            self._steps[now.step] = None
            self._state.groups.once(lambda now=now, record=record: self._recollect(now, record))

    def close(self) -> None:
        """Nothing more is begun; what is under way ends with its client's and its graders' closing."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, now: ScheduleInput) -> Taken:
        step, lag = now.step, self._run.rollout.max_off_policy_steps
        self._steps = {other: future for other, future in self._steps.items() if other >= step}
        self._drop_lost()
        if self._run.rollout.in_flight == "drain":
            self._begin(now, through=step)
            taken = self._wait(step)
            self._begin(now, through=step + lag)
        else:
            self._begin(now, through=step + lag)
            taken = self._wait(step)
        return taken

    def _begin(self, now: ScheduleInput, *, through: int) -> None:
        """Have the steps up to ``through`` collected that are not yet, by the present weights, those of ``now``."""
        last = min(through, self._run.steps - 1)
        moments = [replace(now, step=step) for step in range(now.step, last + 1) if step not in self._steps]
        samples = [self._method.needs_rollouts_at(self._run, moment) for moment in moments]
        if any(samples):
            self._engine.push(self._state, now.step)
        for moment, does_sample in zip(moments, samples, strict=True):
            clients = self._engine.clients if does_sample else ()
            self._steps[moment.step] = (
                self._thread.submit(self._collect, moment, clients, now.step)
                if self._thread is not None
                else None
            )

    def _wait(self, step: int) -> Taken:
        def collected() -> _Collected:
            future = self._steps[step]
            assert future is not None
            return future.result()

        return self._state.groups.from_coordinator(collected)

    def _drop_lost(self) -> None:
        """Forget what a server that is no more has not finished. What it has is a beginning of the steps, in order."""
        if self._generation == self._engine.generation:
            return

        def finished() -> list[int]:
            concurrent.futures.wait([future for future in self._steps.values() if future is not None])
            return [
                step
                for step, future in self._steps.items()
                if future is not None and future.exception() is None
            ]

        kept = self._state.groups.once(finished)
        self._steps = {step: self._steps[step] for step in kept}
        self._generation = self._engine.generation

    def _collect(self, now: ScheduleInput, clients: Sequence[RolloutClient], version: int) -> _Collected:
        assert self._coordinator is not None
        return self._coordinator.collect(now, clients, version)

    def _recollect(self, now: ScheduleInput, record: Mapping[str, Any]) -> None:
        assert self._coordinator is not None
        future: Future[_Collected] = Future()
        try:
            future.set_result(self._coordinator.collect(now, [], record["version"], recorded=record["calls"]))
        except ValueError as error:
            raise ValueError(
                f"the checkpoint holds rollouts of step {now.step}, sampled ahead under other settings: {error}. "
                "Resume with the run's own settings, or with rollout.asynchronous=null, which samples the step anew"
            ) from error
        self._steps[now.step] = future
