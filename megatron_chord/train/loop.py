"""The training loop: push weights, collect, train, evaluate, save. At the end it exports the trained policy.

With ``rollout.asynchronous`` later steps are collected while a step trains. For step t, ``collect`` does this:

    1 ahead, drain   wait for step t | push weights t | start to collect step t+1, which samples while step t trains
    n ahead, keep    push weights t, also during running requests | start to collect step t+n | wait for step t

So with ``drain`` the weights of step t-1 always sample step t, independent of timing. Such a run can be repeated and
resumed bit for bit. Requests that a lost server has not finished are sampled again, by the current weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.profiler import record_function

from megatron_chord.config import RunConfig
from megatron_chord.model.fp8 import set_environment
from megatron_chord.runtime import parallel as runtime
from megatron_chord.runtime.rendezvous import world_size_of_environment
from megatron_chord.schedules import Memory, ScheduleInput
from megatron_chord.timing import Timer
from megatron_chord.train import checkpoint
from megatron_chord.train.best import value_in
from megatron_chord.train.console import step_line, summary
from megatron_chord.train.context import RunContext
from megatron_chord.train.ending import ending
from megatron_chord.train.evaluate import Evaluation, HeldOutSet, due_sets
from megatron_chord.train.export import export_policy
from megatron_chord.train.folder import CHECKPOINTS, POLICY, Resume
from megatron_chord.train.halt import ERRORS, halting
from megatron_chord.train.metrics import RunLog, read_metrics
from megatron_chord.train.setup import check_run, coordinator_timeout_s
from megatron_chord.train.start import UNEVALUATED, Start, refusing, start_run
from megatron_chord.train.state import reset_optimizer
from megatron_chord.train.step import train_step
from megatron_chord.train.step_queue import CollectedStep
from megatron_chord.train.step_row import speed_row, step_row
from megatron_chord.train.stop import EXIT_CODE, EXIT_CODE_IDLE, Stopped, StopWanted
from megatron_chord.train.trace import Tracer


def train(
    run: RunConfig,
    *,
    resume: Resume = "never",
    overwrite: bool = False,
    allow_changed: bool = False,
    check_stop: Callable[[], None] = lambda: None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> None:
    """Run the whole training on this rank. Every rank of the world makes the same call.

    If a run is resumed with other settings that change what is learned, it is refused unless ``allow_changed`` is true.

    ``check_stop`` is called before every step; it raises an exception to end the run. If ``stop_wanted`` returns true
    on any rank before a step, or on the coordinator while it samples or evaluates, the run ends with a checkpoint.

    Raises:
        Stopped: on every rank, because a stop was requested; continue with ``resume="auto"``.
        Refused: settings, data or a checkpoint are not valid; raised before any work.
        Halted: one of the errors that docs/running.md lists.
        Failed: another error, if there are several ranks. Its traceback has been printed, and the groups of ranks still
            exist (``train.ending``).
    """
    set_environment(run.precision)
    world_size = world_size_of_environment()
    with refusing():
        shape, method = check_run(run, world_size)
    groups = runtime.start(
        run.parallel,
        seed=run.seed,
        collective_timeout_s=run.timeouts.collective_s,
        coordinator_timeout_s=coordinator_timeout_s(run, method),
    )
    how = Start(resume=resume, overwrite=overwrite, allow_changed=allow_changed, stop_wanted=stop_wanted)
    with halting(), ending(world_size) as stack:
        try:
            started = start_run(run, shape, method, groups, how, stack)
        except StopWanted:
            raise Stopped("stopped as requested before the first step", exit_code=EXIT_CODE_IDLE) from None
        context, done = started.context, started.step
        if started.evaluates_first:
            _evaluate_first(context, done)
        groups.pulse.enter("computing")
        tracer = Tracer(run.output, rank=groups.rank, first_step=done, count=run.trace_steps)
        stack.callback(tracer.close)
        try:
            _run_steps(context, done, started.memory, tracer, check_stop=check_stop, stop_wanted=stop_wanted)
        except ERRORS:
            _finish_saving(context)
            raise
        _export(context, started.chat_template)
        if context.coordinator is not None:
            _print_outcome(context.coordinator.log, run.output)


def _export(context: RunContext, chat_template: str | None) -> None:
    """Export the last or the best weights to ``policy/``. The state then has these weights. Called on every rank."""
    run, best = context.run, context.best.step
    context.doing("exporting the policy")
    with context.state.groups.pulse.phase("saving"):
        if run.checkpoint.export == "best" and best is not None:
            _load_best(context, best)
        export_policy(context.state, run.model.path, run.output / POLICY, chat_template=chat_template)


def _load_best(context: RunContext, step: int) -> None:
    """Load the best weights. If their checkpoint is damaged, the last weights stay. On every rank."""
    folder = context.run.output / CHECKPOINTS
    try:
        path = checkpoint.find_named(folder, f"step-{step}", print, context.state.groups)
    except ValueError as error:
        context.say(f"the last weights are exported, because the best ones cannot be read: {error}")
        return
    checkpoint.load(context.state, path)
    context.say(f"the exported policy is the best one, from {path}")


def _run_steps(
    context: RunContext,
    done: int,
    memory: Memory,
    tracer: Tracer,
    *,
    check_stop: Callable[[], None],
    stop_wanted: Callable[[], bool],
) -> None:
    """Run the steps after the first ``done``, each with the evaluation and the checkpoint that are due after it."""
    run, groups, saved_step = context.run, context.state.groups, done
    saved_at, allowed_s = time.monotonic(), 60 * run.checkpoint.every_minutes
    for step in range(done, run.steps):
        if context.best.is_exhausted(run.evaluation.patience):
            context.say(
                f"stopped early after {step} steps: {context.best.since} evaluations were no better than "
                f"{context.best.value:.4f} after {context.best.step} steps (evaluation.patience)",
            )
            break
        check_stop()
        try:
            is_late = 0 < allowed_s <= time.monotonic() - saved_at
            requests = groups.gather((stop_wanted(), is_late, context.saver.progress))
            context.saver.settle([progress for _, _, progress in requests])
            if any(wants_stop for wants_stop, _, _ in requests):
                raise StopWanted
            if requests[0][1] and saved_step < step:  # only rank 0's clock decides
                _save(context, step, memory)
                saved_step, saved_at = step, time.monotonic()
            with tracer.step(step):
                memory = _step(context, ScheduleInput(step=step, seed=run.seed, memory=memory))
        except StopWanted:
            if saved_step < step:
                _save(context, step, memory, waits=True)
            context.saver.wait()
            raise _stopped(step, run.steps, first=done) from None
        is_best = False
        if due_sets(run, step + 1):
            try:
                is_best = _evaluate(context, step + 1)
            except StopWanted:
                context.say(
                    f"the evaluation after {step + 1} steps was interrupted; the continued run repeats it"
                )
                _save(context, step + 1, memory, waits=True, unevaluated=True)
                raise _stopped(step + 1, run.steps, first=done) from None
        is_last = step + 1 == run.steps or context.best.is_exhausted(run.evaluation.patience)
        if _is_due(run.checkpoint.every, step + 1) or is_best or is_last:
            _save(context, step + 1, memory, waits=is_last)
            saved_step, saved_at = step + 1, time.monotonic()
    context.saver.wait()


def _finish_saving(context: RunContext) -> None:
    """Finish the checkpoint that is being written, before an error ends the run. A failure of this is only printed."""
    try:
        context.saver.wait()
    except Exception as error:
        context.say(f"the checkpoint that was being written is lost: {error}")


def _evaluate_first(context: RunContext, done: int) -> None:
    """The evaluation before the first step of this process. If it is interrupted, the next start repeats it: the run
    begins anew, or its checkpoint after ``done`` steps says so."""
    try:
        _evaluate(context, done)
    except StopWanted:
        raise _stopped(done, context.run.steps, first=done) from None


def _stopped(step: int, steps: int, *, first: int) -> Stopped:
    """The exception that ends a stopped run after ``step`` of ``steps`` steps. This process started at step
    ``first``."""
    return Stopped(
        f"stopped as requested: {step} of {steps} steps done",
        exit_code=EXIT_CODE if step > first else EXIT_CODE_IDLE,
    )


def _step(context: RunContext, now: ScheduleInput) -> Memory:
    """Run one step, and log its metrics on the coordinator. Returns the memory of mu's schedule."""
    run, method, state, coordinator = context.run, context.method, context.state, context.coordinator
    step, schedule = now.step, method.schedule()
    timer = Timer(mark=record_function)
    with timer.phase("total"):
        with timer.phase("collect"), state.groups.pulse.phase("collecting"):
            inputs, micro_batches = context.engine.attempt(collect, context, now)
            context.queue.remove(step)
            context.engine.release_routes(step)
            context.engine.end_sampling()
        if schedule is not None and schedule.resets_optimizer(step):
            reset_optimizer(state)
        context.doing("training")
        with timer.phase("train"):
            trained = train_step(
                run,
                state,
                context.terms,
                inputs,
                micro_batches,
                step=step,
                mu_gradient=context.mu_gradient,
                health=context.health,
            )
    row = step_row(
        step,
        inputs,
        trained,
        terms=context.terms,
        num_micro_batches=sum(len(batches) for batches in micro_batches),
    )
    with state.groups.pulse.phase("saving"):  # if the disk fails, the writing fails
        if coordinator is not None:
            coordinator.commit(step)
            row |= speed_row(context, inputs, {**timer.seconds, **inputs.seconds})
            coordinator.log.finish_step(row, step_line(row, run.steps))
    mu = inputs.mu
    if schedule is None or mu is None or trained.num_skipped:
        return now.memory  # a skipped update does not change the memory of the schedule
    # All ranks use rank 0's memory: mu decides whether a step samples, so it must be equal on all ranks, bit for bit.
    return state.groups.once(lambda: dict(schedule.remember(now, mu, row)))


def collect(context: RunContext, now: ScheduleInput) -> CollectedStep:
    """Push weights and collect the step ``now``. The collection of later steps may still run when this returns.

    If a rollout server is lost, it is called again from the beginning.
    """
    rollout = context.run.rollout
    steps_ahead = rollout.max_off_policy_steps
    context.queue.forget_lost(context.engine.generation)
    _push_and_start(context, now, through=now.step + steps_ahead if rollout.in_flight == "keep" else now.step)
    context.doing("collecting")
    collected = context.queue.wait(now.step)
    _push_and_start(context, now, through=now.step + steps_ahead)
    return collected


def _push_and_start(context: RunContext, now: ScheduleInput, *, through: int) -> None:
    """Start to collect the steps up to ``through`` that are not in the queue yet, with the weights of step ``now``.

    Weights are pushed only if one of these steps samples.
    """
    steps = context.queue.not_started(now, through=through)
    samples = [context.method.needs_rollouts_at(context.run.batch, step) for step in steps]
    if any(samples):
        context.engine.push_weights(context.state, now.step)
    for step, does_sample in zip(steps, samples, strict=True):
        context.queue.start(step, context.engine.clients if does_sample else (), version=now.step)


def _evaluate(context: RunContext, version: int) -> bool:
    """Evaluate the weights after ``version`` optimizer steps on the held-out problems that are due, if there are any.

    Returns:
        whether they are the best weights so far; false without ``checkpoint.keep_best``.
    """
    coordinator = context.coordinator
    sets = due_sets(context.run, version)
    if not sets:
        return False
    _drain(context)
    with context.state.groups.pulse.phase("evaluating"):
        found = context.engine.attempt(_push_and_measure, context, version, sets)
    with context.state.groups.pulse.phase("saving"):
        if coordinator is not None:
            _log_evaluation(coordinator.log, version, found)
    name = context.run.checkpoint.keep_best
    if name is None or version == 0:
        return False
    try:
        value = value_in(found, name)
        return value is not None and context.best.note(version, value)
    except ValueError as error:
        context.say(f"this evaluation does not count for the best checkpoint: {error}")
        return False


def _log_evaluation(log: RunLog, version: int, found: Mapping[str, Evaluation]) -> None:
    rows = {name: result.to_json() for name, result in found.items()}
    log.write({"step": version, "evaluation": rows.get("", rows)})
    for name, result in found.items():
        numbers = {"accuracy": result.accuracy, **result.metrics}
        numbers_text = ", ".join(f"{metric} {100 * value:.1f} %" for metric, value in numbers.items())
        where = f" on {name}" if name else ""
        log.say(f"evaluation after {version} steps{where}: {numbers_text} on {result.num_problems} problems")


def _push_and_measure(context: RunContext, version: int, sets: Sequence[HeldOutSet]) -> dict[str, Evaluation]:
    """Push the weights and evaluate them. If a rollout server is lost, it is called again from the beginning."""
    groups, coordinator = context.state.groups, context.coordinator
    groups.once(lambda: coordinator.end_if_wanted() if coordinator is not None else None)
    context.engine.push_weights(context.state, version)
    context.doing("evaluating")

    def measure() -> dict[str, Evaluation]:
        assert coordinator is not None
        return coordinator.evaluate(context.engine.clients, version, sets)

    return groups.once(measure)


def _save(
    context: RunContext, step: int, memory: Memory, *, waits: bool = False, unevaluated: bool = False
) -> None:
    """Save a checkpoint. With ``waits`` it is complete when this returns. With ``unevaluated`` a resumed run evaluates
    these weights first."""
    coordinator = context.coordinator
    _drain(context)
    context.doing("saving")
    if context.engine.has_offloaded:  # after an evaluation, or after sampling that was interrupted
        context.engine.end_sampling()
    keys = context.engine.route_keys
    run_state = coordinator.run_state(step, memory, keys) if coordinator is not None else {}
    run_state |= {
        "health": context.health.to_json(),
        "best": context.best.to_json(),
        UNEVALUATED: unevaluated,
    }
    with context.state.groups.pulse.phase("saving"):
        context.saver.save(context.state, run_state, best=context.best.step, waits=waits)


def _drain(context: RunContext) -> None:
    if context.run.rollout.asynchronous is not None:
        context.doing("waiting for running requests")
    with context.state.groups.pulse.phase("collecting"):
        context.queue.drain()


def _print_outcome(log: RunLog, folder: Path) -> None:
    log.say(f"trained policy in {folder / POLICY}")
    table = summary(read_metrics(folder))
    if table is not None:
        log.console.print(table)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
