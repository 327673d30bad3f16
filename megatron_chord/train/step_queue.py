"""The queue of steps whose data are being collected, or are collected but not trained yet.

Without ``rollout.asynchronous``, ``start`` collects a step before it returns. With it, one thread of rank 0 collects
the steps one after another, because each step draws its prompts where the previous step stopped. The settings alone
determine which steps are in the queue, so all ranks agree on it without communication.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import PackedBatch
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.schedules import ScheduleInput
from megatron_chord.train.coordinator import Coordinator, StepInputs
from megatron_chord.train.remote_routes import remote_of, with_routes_here
from megatron_chord.train.stop import StopWanted

CollectedStep = tuple[StepInputs, tuple[Sequence[PackedBatch], ...]]
"""A step's inputs, and this data-parallel rank's micro-batches of each update."""
_LOOK_S = 1.0
"""Seconds between two looks for a stop request while a step is collected by the thread."""
_OfAllRanks = tuple[StepInputs, list[tuple[Sequence[PackedBatch], ...]]]


class RouteServers(Protocol):
    """Servers that keep routes of rollouts (``rollout.route_store``)."""

    @property
    def route_keys(self) -> Mapping[str, str]:
        """The API key of each server, by its URL; on every rank."""
        ...

    @property
    def route_stores(self) -> Collection[str]:
        """The names of the servers' memories; on the coordinator."""
        ...


class StepQueue:
    """All methods except ``close`` are called on every rank. A failure on the coordinator is raised on every rank."""

    def __init__(
        self,
        run: RunConfig,
        groups: ParallelGroups,
        coordinator: Coordinator | None,
        *,
        servers: RouteServers | None = None,
        stop_wanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """``servers``: those that keep routes; None without router replay. ``stop_wanted`` is called on the coordinator
        while it waits for a step that the thread collects."""
        self._stop_wanted = stop_wanted
        self._servers = servers
        self._run = run
        self._groups = groups
        self._coordinator = coordinator
        self._steps: dict[int, Future[_OfAllRanks] | None] = {}
        """Inputs of the started steps, by step number. Only the coordinator has futures; other ranks have None."""
        self._generation = 0
        self._thread: ThreadPoolExecutor | None = None
        if coordinator is not None and run.rollout.max_off_policy_steps > 0:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling-ahead")

    def not_started(self, now: ScheduleInput, *, through: int) -> list[ScheduleInput]:
        """The steps of the run from ``now`` to ``through`` (included) that are not in the queue, in order."""
        last = min(through, self._run.steps - 1)
        return [replace(now, step=step) for step in range(now.step, last + 1) if step not in self._steps]

    def start(self, step: ScheduleInput, clients: Sequence[RolloutClient], *, version: int) -> None:
        """Start to collect ``step`` with these servers, which have weight version ``version``.

        A step that samples nothing needs no clients.
        """
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
        """Wait for the collection of ``step`` and return its result. Raises the error of the collection, if any.

        Routes that are on servers are read.

        Raises:
            RolloutError: a server is lost, with routes of this step. ``forget_lost`` then removes the step.
            StopWanted: a stop was requested. The thread still collects the step.
        """

        def collected() -> _OfAllRanks:
            future = self._steps[step]
            assert future is not None
            while concurrent.futures.wait([future], _LOOK_S).not_done:
                if self._stop_wanted():
                    raise StopWanted
            return future.result()

        inputs, updates = self._groups.from_coordinator(collected)
        if self._servers is not None:
            updates = with_routes_here(updates, self._servers.route_keys, self._groups)
        return inputs, updates

    def remove(self, step: int) -> None:
        """Remove ``step`` from the queue, because it is trained next."""
        del self._steps[step]

    def forget_lost(self, generation: int) -> None:
        """Remove the steps whose collection failed because a rollout server was lost, or whose routes are lost with it.

        Args:
            generation: number of servers that were replaced so far. If it has not changed, nothing is removed.
        """
        if self._generation == generation:
            return
        kept = self._groups.once(self._not_lost)
        self._steps = {step: self._steps[step] for step in kept}
        self._generation = generation

    def _not_lost(self) -> list[int]:
        """The steps that are completely collected and have their routes. On the coordinator."""
        concurrent.futures.wait([future for future in self._steps.values() if future is not None])
        collected = {
            step: future.result()
            for step, future in self._steps.items()
            if future is not None and future.exception() is None
        }
        stores = None if self._servers is None else self._servers.route_stores
        for step in sorted(collected):
            if stores is not None and _needs_other(collected[step], stores):
                assert self._coordinator is not None
                # Later steps draw their prompts where this one stops, so they are collected again, too.
                self._coordinator.forget_from(step)
                return [other for other in collected if other < step]
        return list(collected)

    def drain(self) -> None:
        """Wait until no step is being collected. Errors are not raised here, but by ``wait`` for the step."""

        def wait() -> None:
            concurrent.futures.wait([future for future in self._steps.values() if future is not None])

        if self._steps:
            self._groups.once(wait)

    def restore(self, run_state: Mapping[str, Any]) -> None:
        """Put the steps whose rollouts are in a checkpoint into the queue. Without ``rollout.asynchronous`` they are
        sampled again instead.

        Raises:
            ValueError: they were sampled with other settings.
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
        """Stop the thread. A running collection ends when its clients and graders are closed."""
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
                self._coordinator.collect(step, [], record["version"], recorded=record["rounds"])
            )
        except ValueError as error:
            raise ValueError(
                f"the checkpoint has rollouts of step {step.step} that were sampled with other settings: {error}. "
                "Resume with the settings of the earlier run, or with rollout.asynchronous=null, which samples the "
                "step again"
            ) from error
        self._steps[step.step] = future


def _needs_other(collected: _OfAllRanks, stores: Collection[str]) -> bool:
    """True if routes of a step are in other memories than these ``stores``."""
    _, of_ranks = collected
    return any(
        kept.store not in stores
        for updates in of_ranks
        for routes in remote_of(updates)
        for kept in routes.kept()
    )
