"""The coordinator, on rank 0 only: it collects a step's samples by the method, plans its updates, keeps the cursors."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_chord.config import RunConfig
from megatron_chord.data.packing import Layout, PackedBatch, plan_step
from megatron_chord.losses.aggregate import MIN_COMPARED_TOKENS, drop_zero_gradient_parts, with_scales
from megatron_chord.losses.terms import Term
from megatron_chord.methods.base import Collected, Method
from megatron_chord.records import GradedRollouts, Rollout, TrainSample
from megatron_chord.rewards.graders import Graders
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.runtime.heartbeat import Pulse
from megatron_chord.sampling.context import (
    SamplingServices,
    Sources,
    StepContext,
    unfinished_to_json,
    with_unfinished,
)
from megatron_chord.sampling.recorded import SamplingRound, to_json
from megatron_chord.sampling.rounds import part_means
from megatron_chord.schedules import Memory, ScheduleInput
from megatron_chord.timing import Timer
from megatron_chord.train.evaluate import Evaluation, HeldOutSet, evaluate
from megatron_chord.train.metrics import RunLog
from megatron_chord.train.remote_routes import (
    drawn_with_routes_here,
    json_with_routes_here,
    json_with_routes_that_exist,
)
from megatron_chord.train.sample_rows import sample_rows
from megatron_chord.train.setup import RunData
from megatron_chord.train.stop import StopWanted
from megatron_chord.train.update import Update


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The description of a step that every rank gets, in addition to its own micro-batches."""

    updates: tuple[Update, ...]
    """The step's optimizer updates, one for each of ``batch.updates_per_step``, and the extra update if it has one."""
    mu: float | None
    stats: Mapping[str, Any]
    """The metrics of sampling."""
    seconds: Mapping[str, float]
    """Seconds of each phase of the collection."""
    num_tokens: int
    """Number of tokens that pass through the model, including prompts. A shared prompt counts once."""
    squared_tokens: int
    """Sum over sequences of length squared."""
    weight_version: int
    """Version of the oldest weights that sampled any of the step's rollouts; the step's number if nothing was
    sampled."""


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """The state after a step that the next step starts from."""

    sources: Sources
    memory: Any


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """The sampled answers from which a step was collected."""

    version: int
    rounds: Sequence[SamplingRound]


class Coordinator:
    def __init__(
        self,
        run: RunConfig,
        method: Method,
        data: RunData,
        *,
        layout: Layout,
        graders: Graders,
        log: RunLog,
        stop_wanted: Callable[[], bool] = lambda: False,
        pulse: Pulse | None = None,
    ) -> None:
        self._run = run
        self._lacks_routes = False
        """True if the log says that rollouts lack routes."""
        self._passes_routes = False
        """True if the log says that routes pass through rank 0."""
        self._method = method
        self._terms: Mapping[str, Term] = method.all_terms(run.resolved_objective(), run.batch)
        self._data = data
        self._layout = layout
        self._graders = graders
        self.log = log
        self._stop_wanted = stop_wanted
        self._pulse = pulse or Pulse()
        self._progress = {-1: _Progress(sources=data.sources, memory=None)}
        """The state after each step: the last trained step and the steps collected ahead."""
        self._answers: dict[int, _Answers] = {}
        """The answers of the steps collected ahead, with ``rollout.asynchronous``."""

    # ---- progress: the cursors advance only when a step is done

    def commit(self, step: int) -> None:
        """Record that ``step`` has been trained."""
        # Entries are deleted one by one in the same dictionary, because with ``rollout.asynchronous`` another thread
        # adds later steps at the same time.
        for done in [key for key in list(self._progress) if key < step]:
            del self._progress[done]
        for done in [key for key in list(self._answers) if key <= step]:
            del self._answers[done]

    def forget_from(self, step: int) -> None:
        """Forget what was collected for ``step`` and later ones. They must be collected again, in order."""
        for forgotten in [key for key in self._progress if key >= step]:
            del self._progress[forgotten]
            self._answers.pop(forgotten, None)

    def run_state(
        self, step: int, mu_memory: Memory, route_keys: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The state that a checkpoint after ``step`` optimizer steps saves in addition to weights and optimizer.

        Routes of answers that were sampled ahead are read from the servers, for which ``route_keys`` has the API key,
        by URL. Those of a lost server are left out, and the log says so. No step may be collected at the same time.
        """
        progress = self._progress[step - 1]
        sources = progress.sources
        state = {
            "step": step,
            "method": {"name": self._method.name, "memory": progress.memory},
            "mu": dict(mu_memory),
            "cursors": {
                "prompts": sources.prompt_cursor.state(),
                "demonstrations": sources.demonstration_cursor.state()
                if sources.demonstration_cursor is not None
                else None,
            },
            "unfinished": {"sampled_with": self._sampled_with(), "prompts": unfinished_to_json(sources)},
            "ahead": [
                {"step": ahead, "version": answers.version, "rounds": list(map(to_json, answers.rounds))}
                for ahead, answers in sorted(self._answers.items())
            ],
        }
        if self._data.routes is None:
            return state
        state, lost = json_with_routes_that_exist(state, route_keys or {})
        if lost:
            self.log.say(
                f"the checkpoint does not have the routes of {lost} answers, because their server is lost: a resumed "
                "run trains these answers without router replay"
            )
        return state

    def restore(self, run_state: dict[str, Any]) -> None:
        """Restore the positions in the data from a checkpoint.

        Raises:
            ValueError: the data differ, or unfinished answers were sampled with other settings.
        """
        saved, sources = run_state["cursors"], self._data.sources
        if (sources.demonstration_cursor is None) != (saved["demonstrations"] is None):
            raise ValueError("data.demonstrations was added or removed since the checkpoint was written")
        sources = replace(
            sources,
            prompt_cursor=sources.prompt_cursor.restored(saved["prompts"]),
            demonstration_cursor=sources.demonstration_cursor.restored(saved["demonstrations"])
            if sources.demonstration_cursor is not None
            else None,
        )
        unfinished = run_state.get("unfinished", {"sampled_with": None, "prompts": []})
        keep = self._run.rollout.carries
        then, now = unfinished["sampled_with"], self._sampled_with()
        if keep and then != now and any(item["partial_rollouts"] for item in unfinished["prompts"]):
            raise ValueError(
                f"the checkpoint has unfinished answers that were sampled with {then}, but this run would continue "
                f"them with {now}. Resume with the settings of the earlier run, or with "
                "rollout.partial.unfinished=drop, which samples these prompts again from the beginning"
            )
        sources = with_unfinished(sources, unfinished["prompts"], keep=keep)
        method = run_state["method"]
        memory = method["memory"] if method["name"] == self._method.name else None
        self._progress = {run_state["step"] - 1: _Progress(sources=sources, memory=memory)}

    def _sampled_with(self) -> dict[str, Any]:
        """The settings that must be equal when an unfinished answer is continued."""
        run = self._run
        return {
            "rollout.temperature": run.rollout.temperature,
            "data.max_response_tokens": run.data.max_response_tokens,
            "batch.rollouts": run.batch.rollouts,
        }

    # ---- one step

    def collect(
        self,
        now: ScheduleInput,
        clients: Sequence[RolloutClient],
        version: int,
        *,
        recorded: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[StepInputs, list[tuple[Sequence[PackedBatch], ...]]]:
        """The inputs of a step, and the micro-batches of each update for every data-parallel rank.

        The previous step must have been collected. A repeated call draws the same data. ``recorded`` is a step's
        sampling rounds from a checkpoint; with it nothing is sampled.

        Raises:
            StopWanted: a stop was requested while the step was sampled. Not with ``rollout.asynchronous`` and
                ``in_flight: drain``, because the resumed run would sample the step by other weights.
            ValueError: the recorded answers do not fit the requests of this step.
        """
        run, timer, before = self._run, Timer(), self._progress[now.step - 1]
        is_asynchronous = run.rollout.max_off_policy_steps > 0
        services = SamplingServices(
            clients=clients,
            version=version,
            template=self._data.template,
            graders=self._graders,
            may_advance=run.rollout.in_flight == "keep",
            routes=self._data.routes,
            check=self.end_if_wanted if not is_asynchronous or run.rollout.in_flight == "keep" else _go_on,
        )
        context = StepContext(
            run,
            services,
            before.sources,
            now=now,
            memory=before.memory,
            timer=timer,
            notify=self._report_progress if is_asynchronous else self._doing,
            recorded=recorded,
        )
        collected = self._collect_by(context)
        sources, memory = context.sources, collected.memory
        if self._data.routes is not None:
            # Servers free the routes of this step when it is trained, so rank 0 reads those that it keeps longer.
            keys = {client.url: client.api_key for client in clients}
            sources = replace(sources, unfinished=drawn_with_routes_here(sources.unfinished, keys))
            memory = json_with_routes_here(memory, keys)
        self._progress[now.step] = _Progress(sources=sources, memory=memory)
        if is_asynchronous:
            self._answers[now.step] = _Answers(version=version, rounds=context.rounds)
        if context.graded:
            self.log.write_samples(now.step, sample_rows(context.graded, self._data.template))
        with timer.phase("pack"):
            count = run.batch.updates_per_step
            scaled = [with_scales(collected.samples[index::count], self._terms) for index in range(count)]
            if collected.extra is not None:
                scaled.append(with_scales(collected.extra.samples, self._terms))
            # Log-probs are compared in the step's first update, and the noise is measured there. Later updates keep at
            # least one token.
            first = MIN_COMPARED_TOKENS if collected.noise is None else sys.maxsize
            trained = [
                drop_zero_gradient_parts(samples, self._terms, min_tokens=1 if index > 0 else first)
                for index, samples in enumerate(scaled)
            ]
            plans = [
                plan_step(samples, max_tokens=run.batch.max_tokens_per_gpu, layout=self._layout, pad_id=0)
                for samples in trained
            ]
        saved = [batch.saved for plan in plans for rank in plan.micro_batches for batch in rank]
        rollouts = [rollout for item in context.graded for rollout in item.rollouts]
        if self._data.routes is not None and rollouts:
            self._report_missing_routes(rollouts, is_new=recorded is None)
        inputs = StepInputs(
            updates=tuple(_update(collected, index, count, plan.counts) for index, plan in enumerate(plans)),
            mu=collected.mu,
            stats={
                **collected.stats,
                **_rollout_stats(context.graded),
                **_demonstration_stats(context.sources),
                **(_by_source(context.graded) if len(run.data.prompts) > 1 else {}),
                **(_staleness(rollouts, now.step) if run.rollout.has_older_tokens else {}),
                **(_unfinished_stats(context) if run.rollout.partial is not None and rollouts else {}),
                **(_routed(rollouts) if self._data.routes is not None and rollouts else {}),
                "zero_advantage_tokens": _num_tokens(scaled) - _num_tokens(trained),
            },
            seconds=timer.seconds,
            num_tokens=_num_tokens(trained) - sum(tokens for tokens, _ in saved),
            squared_tokens=sum(len(sample.token_ids) ** 2 for samples in trained for sample in samples)
            - sum(squares for _, squares in saved),
            weight_version=min((rollout.weight_version for rollout in rollouts), default=now.step),
        )
        return inputs, [
            tuple(plan.micro_batches[rank] for plan in plans) for rank in range(self._layout.data)
        ]

    def _collect_by(self, context: StepContext) -> Collected:
        collected = self._method.collect(context)
        if context.has_more_recorded():
            raise ValueError("the checkpoint has more sampling rounds than the step requests")
        return collected

    def _report_missing_routes(self, rollouts: Sequence[Rollout], *, is_new: bool) -> None:
        """Log two facts, each once in a run: rollouts have no routes, so they are trained without router replay;
        servers do not keep the routes of new rollouts."""
        missing = sum(rollout.routes is None for rollout in rollouts)
        if missing and not self._lacks_routes:
            self._lacks_routes = True
            self.log.say(
                f"{missing} of {len(rollouts)} rollouts have no routes, so the trainer's routers choose their experts "
                "(rollout.router_replay). Servers in rollout.servers return routes if they are started with "
                "--enable-return-routed-experts"
            )
        passing = sum(isinstance(rollout.routes, np.ndarray) for rollout in rollouts)
        expected = self._run.rollout.carries and passing < len(rollouts)  # finished in an earlier step
        if is_new and passing and not expected and not self._passes_routes:
            self._passes_routes = True
            self.log.say(
                f"the routes of {passing} of {len(rollouts)} rollouts pass through rank 0, because their servers do "
                "not keep them (docs/scale.md)"
            )

    def _report_progress(self, what: str) -> None:
        self._pulse.progress_elsewhere("collecting")

    def _doing(self, what: str) -> None:
        self._report_progress(what)
        self.log.doing(what)

    def end_if_wanted(self) -> None:
        """Raise StopWanted if a stop was requested."""
        if self._stop_wanted():
            raise StopWanted

    def evaluate(
        self, clients: Sequence[RolloutClient], version: int, sets: Sequence[HeldOutSet]
    ) -> dict[str, Evaluation]:
        """Evaluate these sets of problems, by their names. The weights of ``version`` must be on the servers.

        Raises:
            StopWanted: a stop was requested before the end. Nothing is recorded.
        """
        results: dict[str, Evaluation] = {}
        answers: list[GradedRollouts] = []
        for held_out in sets:
            problems = [
                problem
                for problem in self._data.problems
                if not held_out.name or problem.source == held_out.name
            ]
            results[held_out.name], graded = evaluate(
                self._run,
                problems,
                clients,
                held_out=held_out,
                template=self._data.template,
                graders=self._graders,
                version=version,
                check=self.end_if_wanted,
            )
            answers += graded
        self.log.write_samples(version, sample_rows(answers, self._data.template), kind="evaluation")
        return results


def _go_on() -> None:
    """The check of a collection that no stop interrupts."""


def _update(collected: Collected, index: int, count: int, tokens: Mapping[str, int]) -> Update:
    """Update ``index`` of a step: one of its ``count`` updates, or the extra one after them."""
    if index == count:
        assert collected.extra is not None
        return Update(weights=collected.extra.weights, counts=tokens, is_extra=True)
    noise = collected.noise if index == 0 else None
    return Update(weights=collected.weights, counts=tokens, noise=noise)


def _num_tokens(updates: Sequence[Sequence[TrainSample]]) -> int:
    """Number of tokens of all samples, including their prompts."""
    return sum(len(sample.token_ids) for samples in updates for sample in samples)


def _rollout_stats(graded: Sequence[GradedRollouts]) -> dict[str, Any]:
    rollouts = [rollout for item in graded for rollout in item.rollouts]
    if not rollouts:
        return {}
    return {
        "response_length": statistics.fmean(len(rollout.token_ids) for rollout in rollouts),
        "truncated_fraction": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "grader_errors": sum(grade.error is not None for item in graded for grade in item.grades),
        **part_means(graded),
    }


def _routed(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The share of the rollouts that have routes."""
    return {"routed_rollouts": statistics.fmean(rollout.routes is not None for rollout in rollouts)}


def _demonstration_stats(sources: Sources) -> dict[str, Any]:
    cursor = sources.demonstration_cursor
    return {"demonstration_epochs": cursor.position / cursor.size} if cursor is not None else {}


def _by_source(graded: Sequence[GradedRollouts]) -> dict[str, Any]:
    """For each source with prompts in this step: the number of prompts, the mean reward and the mean score."""
    of: dict[str, list[GradedRollouts]] = {}
    for item in graded:
        of.setdefault(item.prompt.source, []).append(item)
    stats: dict[str, dict[str, float]] = {"prompts": {}, "reward": {}, "accuracy": {}}
    for source, items in of.items():
        pairs = [
            (grade.score, reward)
            for item in items
            for grade, reward in zip(item.grades, item.rewards, strict=True)
            if grade.score is not None and reward is not None
        ]
        stats["prompts"][source] = len(items)
        if pairs:
            stats["accuracy"][source] = statistics.fmean(score for score, _ in pairs)
            stats["reward"][source] = statistics.fmean(reward for _, reward in pairs)
    return stats if graded else {}


def _staleness(rollouts: Sequence[Rollout], step: int) -> dict[str, Any]:
    """Metrics of the tokens' age in optimizer steps; empty if there are no tokens."""
    spans = [(step - version, count) for rollout in rollouts for version, count in rollout.all_spans]
    if not spans:
        return {}
    return {
        "staleness_mean": sum(age * count for age, count in spans) / sum(count for _, count in spans),
        "staleness_max": max(age for age, _ in spans),
        "mixed_rollouts": statistics.fmean(bool(rollout.spans) for rollout in rollouts),
    }


def _unfinished_stats(context: StepContext) -> dict[str, Any]:
    return {
        "continued_prompts": context.num_continued,
        "unfinished_prompts": len(context.stopped),
        "unfinished_tokens": sum(
            len(rollout.token_ids) for item in context.stopped for rollout in item.partial_rollouts
        ),
    }
