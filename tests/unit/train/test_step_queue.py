"""The order of weight pushes, sampling and training, with a scripted engine that records its calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_chord.config import AsynchronousConfig, RunConfig
from megatron_chord.data.packing import Layout, pack
from megatron_chord.methods.table import build
from megatron_chord.records import TrainSample
from megatron_chord.rollout.replies import RolloutError
from megatron_chord.routes import KeptRoutes, RemoteRoutes, RouteShape
from megatron_chord.schedules import Binary, ScheduleInput
from megatron_chord.train.context import RunContext
from megatron_chord.train.health import Health
from megatron_chord.train.loop import collect
from megatron_chord.train.step_queue import StepQueue
from megatron_chord.train.stop import StopWanted
from tests.support.tiny import tiny_run

STEPS = 4


class OneRank:
    """``ParallelGroups`` with a single rank."""

    def from_coordinator(self, compute: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        common, per_rank = compute()
        return common, per_rank[0]

    def once(self, compute: Callable[[], Any]) -> Any:
        return compute()

    once_per_replica = once


class Script:
    """The engine and the coordinator in one. Every push and every collection is an event, in the order of their
    starts."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.generation = 0
        self.clients = ("client",)
        self.failures: dict[int, list[Exception]] = {}
        self.gates: dict[int, threading.Event] = {}
        """The gate that the collection of each step waits for."""
        self.waiting = threading.Event()
        """Set when a collection waits at its gate."""
        self._version: int | None = None
        self.log = SimpleNamespace(doing=lambda what: None)

    def push_weights(self, state: Any, version: int) -> None:
        if self._version != version:
            self.events.append(f"push {version}")
        self._version = version

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                return action(*arguments)
            except RolloutError:
                self.generation += 1
                self._version = None
                self.events.append("another server")

    def collect(self, now: ScheduleInput, clients: Any, version: int, *, recorded: Any = None) -> Any:
        how = "recorded" if recorded is not None else "sampled" if clients else "drawn"
        self.events.append(f"{now.step} {how} by {version}")
        if now.step in self.gates:
            self.waiting.set()
            assert self.gates[now.step].wait(10)
        if self.failures.get(now.step):
            raise self.failures[now.step].pop(0)
        return f"{now.step} by {version}", [f"batches of {now.step}"]


def run_ahead(*, steps_ahead: int, in_flight: Any = "drain", **objective: Any) -> RunConfig:
    run = tiny_run(Path("model"), **objective)
    return replace(
        run,
        steps=STEPS,
        rollout=replace(
            run.rollout,
            asynchronous=AsynchronousConfig(max_off_policy_steps=steps_ahead, in_flight=in_flight)
            if steps_ahead
            else None,
        ),
    )


@pytest.fixture
def script() -> Script:
    return Script()


class Collecting:
    """The part of a run that collects steps."""

    def __init__(self, run: RunConfig, script: Any, *, servers: Any = None, **more: Any) -> None:
        groups: Any = OneRank()
        state: Any = SimpleNamespace(groups=groups)
        self._context = RunContext(
            run=run,
            method=build(run.method),
            terms={},
            state=state,
            engine=script,
            queue=StepQueue(run, groups, script, servers=servers, **more),
            saver=script,
            coordinator=script,
            mu_gradient=None,
            health=Health(),
        )
        queue = self._context.queue
        self.drain, self.restore, self.close = queue.drain, queue.restore, queue.close

    def take(self, now: ScheduleInput) -> Any:
        """Take a step as the training loop does."""
        collected = self._context.engine.attempt(collect, self._context, now)
        self._context.queue.remove(now.step)
        return collected


@pytest.fixture
def trained(script: Script) -> Iterator[Callable[..., list[Any]]]:
    """Train the steps. A training lasts until everything that has begun has ended."""
    opened: list[Collecting] = []

    def train(run: RunConfig, first: int = 0, *, record: Any = None) -> list[Any]:
        ahead = Collecting(run, script)
        opened.append(ahead)
        if record is not None:
            ahead.restore(record)
        taken = []
        for step in range(first, run.steps):
            taken.append(ahead.take(ScheduleInput(step=step)))
            script.events.append(f"train {step}")
            ahead.drain()
        return taken

    yield train
    for ahead in opened:
        ahead.close()


def without_trainings(events: list[str]) -> list[str]:
    return [event for event in events if not event.startswith("train")]


def test_without_steps_ahead_every_step_samples_with_its_own_weights(script: Script, trained: Any) -> None:
    taken = trained(run_ahead(steps_ahead=0))
    assert taken == [(f"{step} by {step}", f"batches of {step}") for step in range(STEPS)]
    assert script.events[:4] == ["push 0", "0 sampled by 0", "train 0", "push 1"]


def test_drained_sampling_is_one_step_older_and_pushes_come_between(script: Script, trained: Any) -> None:
    taken = trained(run_ahead(steps_ahead=1))
    assert [common for common, _ in taken] == ["0 by 0", "1 by 0", "2 by 1", "3 by 2"]
    assert without_trainings(script.events) == [
        "push 0",
        "0 sampled by 0",
        "1 sampled by 0",
        "push 1",
        "2 sampled by 1",
        "push 2",
        "3 sampled by 2",
    ]


def test_training_does_not_wait_for_the_step_after(script: Script) -> None:
    script.gates[1] = threading.Event()
    ahead = Collecting(run_ahead(steps_ahead=1), script)
    assert ahead.take(ScheduleInput(step=0))[0] == "0 by 0"
    assert script.events[:2] == ["push 0", "0 sampled by 0"]
    script.gates[1].set()
    assert ahead.take(ScheduleInput(step=1))[0] == "1 by 0"
    ahead.close()


def test_with_keep_weights_are_pushed_before_the_sampling_has_ended(script: Script) -> None:
    script.gates[1] = threading.Event()
    ahead = Collecting(run_ahead(steps_ahead=1, in_flight="keep"), script)
    ahead.take(ScheduleInput(step=0))
    assert script.waiting.wait(10)
    threading.Timer(0.3, script.gates[1].set).start()
    assert ahead.take(ScheduleInput(step=1))[0] == "1 by 0"
    ahead.drain()
    assert script.events == ["push 0", "0 sampled by 0", "1 sampled by 0", "push 1", "2 sampled by 1"]
    ahead.close()


@pytest.mark.parametrize("in_flight", ["drain", "keep"])
def test_a_stop_ends_the_wait_for_a_step_that_is_sampled(script: Script, in_flight: Any) -> None:
    """The step is not lost: the checkpoint waits for it."""
    script.gates[1] = threading.Event()
    ahead = Collecting(
        run_ahead(steps_ahead=1, in_flight=in_flight), script, stop_wanted=script.waiting.is_set
    )
    ahead.take(ScheduleInput(step=0))
    assert script.waiting.wait(10)
    with pytest.raises(StopWanted):
        ahead.take(ScheduleInput(step=1))
    script.gates[1].set()
    ahead.drain()
    assert ahead.take(ScheduleInput(step=1))[0] == "1 by 0"
    ahead.close()


def test_more_steps_ahead_are_all_queued(script: Script, trained: Any) -> None:
    taken = trained(run_ahead(steps_ahead=2, in_flight="keep"))
    assert [common for common, _ in taken] == ["0 by 0", "1 by 0", "2 by 0", "3 by 1"]


def test_steps_that_sample_nothing_push_nothing(script: Script, trained: Any) -> None:
    """mu is 1 for two steps. The first step of RL is sampled while the last SFT step trains, by the weights of that
    step's start."""
    trained(run_ahead(steps_ahead=1, mu=Binary(switch_step=2)))
    assert without_trainings(script.events) == [
        "0 drawn by 0",
        "1 drawn by 0",
        "push 1",
        "2 sampled by 1",
        "push 2",
        "3 sampled by 2",
    ]


def test_a_failure_is_raised_when_its_step_comes(script: Script) -> None:
    script.failures[1] = [ValueError("no")]
    ahead = Collecting(run_ahead(steps_ahead=1), script)
    ahead.take(ScheduleInput(step=0))
    ahead.drain()
    with pytest.raises(ValueError, match="no"):
        ahead.take(ScheduleInput(step=1))
    ahead.close()


def test_what_a_lost_server_has_not_finished_is_sampled_by_the_present_weights(
    script: Script, trained: Any
) -> None:
    script.failures[1] = [RolloutError("gone")]
    taken = trained(run_ahead(steps_ahead=1))
    assert [common for common, _ in taken] == ["0 by 0", "1 by 1", "2 by 1", "3 by 2"]
    assert script.events.count("another server") == 1


def test_what_a_lost_server_has_finished_is_kept(script: Script) -> None:
    """The evaluation found the server lost and replaced it. Steps that were complete by then are not sampled again."""
    ahead = Collecting(run_ahead(steps_ahead=1), script)
    ahead.take(ScheduleInput(step=0))
    ahead.drain()
    script.generation += 1
    assert ahead.take(ScheduleInput(step=1))[0] == "1 by 0"
    ahead.close()


def test_recorded_steps_are_not_sampled_again(script: Script, trained: Any) -> None:
    record = {"mu": {}, "ahead": [{"step": 2, "version": 1, "rounds": []}]}
    taken = trained(run_ahead(steps_ahead=1), 2, record=record)
    assert [common for common, _ in taken] == ["2 by 1", "3 by 2"]
    assert without_trainings(script.events) == ["2 recorded by 1", "push 2", "3 sampled by 2"]


def test_without_steps_ahead_recorded_steps_are_dropped(script: Script, trained: Any) -> None:
    record = {"mu": {}, "ahead": [{"step": 2, "version": 1, "rounds": []}]}
    taken = trained(run_ahead(steps_ahead=0), 2, record=record)
    assert [common for common, _ in taken] == ["2 by 2", "3 by 3"]


class RoutedScript(Script):
    """Its rollouts have routes on the servers ``route_stores``. No server answers: their addresses are closed ports."""

    def __init__(self) -> None:
        super().__init__()
        self.route_stores = {"first", "second"}
        self.route_keys: dict[str, str] = {}
        self.forgotten: list[int] = []
        self.kept_by: dict[int, str] = {}

    def collect(self, now: ScheduleInput, clients: Any, version: int, *, recorded: Any = None) -> Any:
        common, _ = super().collect(now, clients, version, recorded=recorded)
        store = self.kept_by.get(now.step)
        if store is None or "another server" in self.events:
            return common, [()]
        kept = KeptRoutes(
            url="http://127.0.0.1:9",
            store=store,
            key="key",
            num_tokens=3,
            dtype="uint8",
            checksum=0,
            shape=RouteShape(layers=1, experts=4, chosen=2),
        )
        sample = TrainSample(token_ids=np.arange(4), parts=(), routes=RemoteRoutes.of(kept))
        return common, [((pack([sample], columns={}, layout=Layout(), pad_id=0),),)]

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """A lost server is replaced by one with another memory."""

        def attempted(*arguments: Any) -> Any:
            try:
                return action(*arguments)
            except RolloutError:
                self.route_stores = {"second", "third"}
                raise

        return super().attempt(attempted, *arguments)

    def forget_from(self, step: int) -> None:
        self.forgotten.append(step)


def test_a_step_whose_routes_cannot_be_read_is_collected_again() -> None:
    script = RoutedScript()
    script.kept_by = {0: "first"}
    ahead = Collecting(run_ahead(steps_ahead=0), script, servers=script)
    assert ahead.take(ScheduleInput(step=0)) == ("0 by 0", ())
    assert script.events == ["push 0", "0 sampled by 0", "another server", "push 0", "0 sampled by 0"]
    assert script.forgotten == [0]


def test_steps_ahead_whose_routes_are_lost_are_collected_again_with_all_after_them() -> None:
    """Of the steps 1 to 3, step 2 has routes on a server that an evaluation found lost."""
    script = RoutedScript()
    script.kept_by = {2: "first"}
    ahead = Collecting(run_ahead(steps_ahead=3, in_flight="keep"), script, servers=script)
    ahead.take(ScheduleInput(step=0))
    ahead.drain()
    script.route_stores = {"second"}
    script.generation += 1
    script.events.append("another server")
    assert ahead.take(ScheduleInput(step=1)) == ("1 by 0", ())
    ahead.drain()
    assert script.forgotten == [2]
    assert script.events[-3:] == ["push 1", "2 sampled by 1", "3 sampled by 1"]
    ahead.close()
