"""The training loop: push weights, collect, train, evaluate, save. At the end it exports the trained policy.

With ``rollout.asynchronous`` later steps are collected while a step trains. For step t, ``collect`` does this:

    lag 1, drain   wait for step t | push weights t | start to collect step t+1, which samples while step t trains
    lag n, keep    push weights t, also during running requests | start to collect step t+n | wait for step t

So with ``drain`` the weights of step t-1 always sample step t, independent of timing. Such a run can be repeated and
resumed bit for bit. Requests that a lost server has not finished are sampled again, by the current weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import record_function

from megatron_chord.config import RunConfig
from megatron_chord.config_io import plain_settings
from megatron_chord.data.packing import Layout
from megatron_chord.families.shape import ModelShape
from megatron_chord.losses.terms import Term, num_forward_passes
from megatron_chord.methods.base import Method
from megatron_chord.model.fp8 import set_environment
from megatron_chord.precision import preset
from megatron_chord.report.page import REPORT, write_report
from megatron_chord.rewards.graders import Graders, check_reward
from megatron_chord.runtime import parallel as runtime
from megatron_chord.runtime.heartbeat import Pulse
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.runtime.rendezvous import world_size_of_environment
from megatron_chord.schedules import Memory, MuSchedule, ScheduleInput
from megatron_chord.timing import Timer
from megatron_chord.train import checkpoint
from megatron_chord.train.best import Best, is_exhausted, value_of
from megatron_chord.train.console import step_line, summary
from megatron_chord.train.coordinator import Coordinator, StepInputs
from megatron_chord.train.course import changed_course
from megatron_chord.train.engine import RolloutEngine
from megatron_chord.train.export import export_policy
from megatron_chord.train.folder import CHECKPOINTS, LOGS, POLICY, Claim, Resume, claim
from megatron_chord.train.halt import halting
from megatron_chord.train.health import Health, not_finite
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.metrics import DROPPED, RunLog, read_metrics, write_left_out
from megatron_chord.train.sanity import check_finite
from megatron_chord.train.segments import check_changes, settings_before
from megatron_chord.train.setup import (
    RunData,
    check_run,
    coordinator_timeout_s,
    load_data,
    needs_servers,
    packing_layout,
    plan_lines,
    reference_folder,
)
from megatron_chord.train.state import TrainState, build_state, reset_optimizer, restart_schedule
from megatron_chord.train.step import train_step
from megatron_chord.train.step_queue import CollectedStep, StepQueue
from megatron_chord.train.stop import EXIT_CODE, EXIT_CODE_IDLE, Stopped, StopWanted
from megatron_chord.train.throughput import held_gpus, own_gpu, throughput
from megatron_chord.train.trace import Tracer
from megatron_chord.train.watch import clear_leftovers, start_watch


class Refused(ValueError):
    """Settings, data or a checkpoint are not valid. Nothing has been trained."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    run: RunConfig
    method: Method
    terms: Mapping[str, Term]
    state: TrainState
    engine: RolloutEngine
    queue: StepQueue
    coordinator: Coordinator | None
    """On rank 0; None on the other ranks."""
    mu_gradient: MuGradient | None
    """None unless mu is learned."""
    health: Health
    best: Best = field(default_factory=Best)


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
    on any rank before a step, or on the coordinator while it samples, the run writes a checkpoint and ends.

    Raises:
        Stopped: on every rank, because a stop was requested; continue with ``resume="auto"``.
        Refused: settings, data or a checkpoint are not valid; raised before any work.
        Halted: one of the errors that docs/running.md lists.
    """
    with _refusing():
        shape, method = check_run(run, world_size_of_environment())
    set_environment(run.precision)
    groups = runtime.start(
        run.parallel,
        seed=run.seed,
        collective_timeout_s=run.timeouts.collective_s,
        coordinator_timeout_s=coordinator_timeout_s(run, method),
    )
    with halting(), ExitStack() as stack:
        stack.callback(runtime.stop)
        watch = start_watch(run, groups)
        if watch is not None:
            stack.callback(watch.close)
        coordinator: Coordinator | None = None
        claimed: Claim | None = None
        data: RunData | None = None

        def prepare() -> None:
            nonlocal claimed, data
            check_reward(run.reward)
            data = load_data(run, shape)
            claimed = claim(run, resume=resume, overwrite=overwrite)
            stack.callback(_report, claimed)  # runs after servers and logs are closed, also after an error
            stack.enter_context(claimed)
            clear_leftovers(run, watch)
            checkpoint.clear_partial(run.output / CHECKPOINTS, print)

        def make_coordinator() -> None:
            nonlocal coordinator
            assert data is not None
            changed = _changed(run, method, saved, allow_changed) if saved is not None else []
            layout = packing_layout(shape, run.parallel, groups.data.size, preset(run.precision).training)
            coordinator = _make_coordinator(
                run, method, data, layout, saved, stack, stop_wanted, groups.pulse
            )
            if changed:
                coordinator.log.say("\n".join(changed))
            if resume == "auto" and saved is None:
                coordinator.log.say(f"no checkpoint in {run.output / CHECKPOINTS}: starting at step 0")
            plan_lines(run, shape, method, groups.world_size, coordinator.log.say)

        with _refusing():
            groups.once(prepare)
            saved = _find(run.output / CHECKPOINTS, resume, groups)
            groups.once(make_coordinator)
        with _refusing():
            parts = _build(run, shape, method, groups, coordinator, stack, stop_wanted)
            done, memory = _resume(parts, saved) if saved is not None else (0, {})
            groups.once(lambda: _begin(claimed, coordinator, data, done, resume))
        if done == 0:
            _evaluate_first(parts)
        groups.pulse.enter("computing")
        tracer = Tracer(run.output, rank=groups.rank, first_step=done, count=run.trace_steps)
        stack.callback(tracer.close)
        _run_steps(parts, done, memory, tracer, check_stop=check_stop, stop_wanted=stop_wanted)
        _export(parts, data.template.exported if data is not None else None)
        if coordinator is not None:
            _tell_outcome(coordinator.log, run.output)


def _export(parts: RunContext, chat_template: str | None) -> None:
    """Export the last or the best weights to ``policy/``. The state then has these weights. Called on every rank."""
    run, best = parts.run, parts.best.step
    _doing(parts.coordinator, "exporting the policy")
    with parts.state.groups.pulse.phase("saving"):
        if run.checkpoint.export == "best" and best is not None:
            _load_best(parts, best)
        export_policy(parts.state, run.model.path, run.output / POLICY, chat_template=chat_template)


def _load_best(parts: RunContext, step: int) -> None:
    """Load the best weights. If their checkpoint is damaged, the last weights stay. On every rank."""
    folder = parts.run.output / CHECKPOINTS
    try:
        path = checkpoint.find_named(folder, f"step-{step}", print, parts.state.groups)
    except ValueError as error:
        _say(
            parts.coordinator, f"the last weights are exported, because the best ones cannot be read: {error}"
        )
        return
    checkpoint.load(parts.state, path)
    _say(parts.coordinator, f"the policy to export is the best one, that of {path}")


def _begin(
    claimed: Claim | None, coordinator: Coordinator | None, data: RunData | None, done: int, resume: Resume
) -> None:
    """Take over the folder for this run, after all checks have passed. Called on the coordinator."""
    assert claimed is not None
    assert coordinator is not None
    assert data is not None
    claimed.begin(first_step=done)
    coordinator.log.begin()
    write_left_out(claimed.folder, data.left_out)
    if resume not in ("never", "auto"):
        checkpoint.set_aside(claimed.folder / CHECKPOINTS, after=done, notify=coordinator.log.say)


def _find(folder: Path, resume: Resume, groups: ParallelGroups) -> Path | None:
    """The checkpoint from which the run continues; None to start from the beginning. Called on every rank."""
    if resume == "never":
        return None
    if resume == "auto":
        return checkpoint.find(folder, print, groups)
    return checkpoint.find_named(folder, resume, print, groups)


def _changed(run: RunConfig, method: Method, saved: Path, allowed: bool) -> list[str]:
    """Lines about the settings that differ from those of the checkpoint ``saved``.

    Raises:
        ValueError: a difference is not allowed.
    """
    done = checkpoint.step_of(saved)
    before = settings_before(run.output, done)
    remark = changed_course(before, run, step=done, since=_last_reset(method, run, done))
    return check_changes(before, plain_settings(run), allowed=allowed, remarks=[remark] if remark else [])


def _last_reset(method: Method, run: RunConfig, step: int) -> int:
    """The last step before ``step`` at which the learning-rate schedule was reset."""
    schedule = method.schedule(run)
    return 0 if schedule is None else max(filter(schedule.resets_optimizer, range(step)), default=0)


def _build(
    run: RunConfig,
    shape: ModelShape,
    method: Method,
    groups: ParallelGroups,
    coordinator: Coordinator | None,
    stack: ExitStack,
    stop_wanted: Callable[[], bool],
) -> RunContext:
    """Start the servers and build model and optimizer. ``stack`` closes them. Called on every rank."""
    # The server loads while the model is built, unless it shares the ranks' GPUs.
    engine = RolloutEngine(
        run,
        groups,
        is_needed=needs_servers(run, method),
        log_folder=run.output / LOGS,
        notify=partial(_say, coordinator),
        doing=partial(_doing, coordinator),
        stop_wanted=stop_wanted,
    )
    stack.callback(engine.close)
    terms = method.terms(run)
    _doing(coordinator, "building the model")
    state = build_state(
        shape,
        run.model,
        run.parallel,
        run.optim,
        groups=groups,
        steps=run.steps,
        reference=reference_folder(run, terms),
        fp8=preset(run.precision).training,
    )
    queue = StepQueue(run, groups, coordinator)
    stack.callback(queue.close)
    schedule = method.schedule(run)
    return RunContext(
        run=run,
        method=method,
        terms=terms,
        state=state,
        engine=engine,
        queue=queue,
        coordinator=coordinator,
        mu_gradient=MuGradient() if schedule is not None and schedule.needs_mu_gradient else None,
        health=Health(),
    )


def _run_steps(
    parts: RunContext,
    done: int,
    memory: Memory,
    tracer: Tracer,
    *,
    check_stop: Callable[[], None],
    stop_wanted: Callable[[], bool],
) -> None:
    """Run the steps after the first ``done``, each with the evaluation and the checkpoint that are due after it."""
    run, groups, saved_step = parts.run, parts.state.groups, done
    saved_at, allowed_s = time.monotonic(), 60 * run.checkpoint.every_minutes
    for step in range(done, run.steps):
        if is_exhausted(parts.best, run):
            _say(
                parts.coordinator,
                f"stopped early after {step} steps: {parts.best.since} evaluations were no better than "
                f"{parts.best.value:.4f} after {parts.best.step} steps (evaluation.patience)",
            )
            break
        check_stop()
        try:
            is_late = 0 < allowed_s <= time.monotonic() - saved_at
            wishes = groups.gather((stop_wanted(), is_late))
            if any(wants_stop for wants_stop, _ in wishes):
                raise StopWanted
            if wishes[0][1] and saved_step < step:  # only rank 0's clock decides
                _save(parts, step, memory)
                saved_step, saved_at = step, time.monotonic()
            with tracer.step(step):
                memory = _step(parts, ScheduleInput(step=step, seed=run.seed, memory=memory))
        except StopWanted:
            if saved_step < step:
                _save(parts, step, memory)
            raise _stopped(run, step, first=done) from None
        is_best = False
        if _is_due(run.evaluation.every, step + 1) or step + 1 == run.steps:
            try:
                is_best = _evaluate(parts, step + 1)
            except StopWanted:
                _say(
                    parts.coordinator,
                    f"the evaluation after {step + 1} steps is left out: its server is lost",
                )
                _save(parts, step + 1, memory)
                raise _stopped(run, step + 1, first=done) from None
        is_last = step + 1 == run.steps or is_exhausted(parts.best, run)
        if _is_due(run.checkpoint.every, step + 1) or is_best or is_last:
            _save(parts, step + 1, memory)
            saved_step, saved_at = step + 1, time.monotonic()


def _evaluate_first(parts: RunContext) -> None:
    try:
        _evaluate(parts, 0)
    except StopWanted:
        raise _stopped(parts.run, 0, first=0) from None


def _stopped(run: RunConfig, step: int, *, first: int) -> Stopped:
    """The end of a run whose first ``step`` steps are done. This process began at step ``first``."""
    return Stopped(
        f"stopped as requested: {step} of {run.steps} steps done",
        exit_code=EXIT_CODE if step > first else EXIT_CODE_IDLE,
    )


def _step(parts: RunContext, now: ScheduleInput) -> Memory:
    """Run one step, and log its metrics on the coordinator. Returns the memory of mu's schedule."""
    run, method, state, coordinator = parts.run, parts.method, parts.state, parts.coordinator
    step, schedule = now.step, method.schedule(run)
    timer = Timer(mark=record_function)
    with timer.phase("total"):
        with timer.phase("collect"), state.groups.pulse.phase("collecting"):
            inputs, micro_batches = parts.engine.attempt(lambda: collect(parts, now))
            parts.queue.remove(step)
            parts.engine.rest()
        if schedule is not None and schedule.resets_optimizer(step):
            reset_optimizer(state)
        _doing(coordinator, "training")
        with timer.phase("train"):
            done = train_step(
                run,
                state,
                parts.terms,
                inputs,
                micro_batches,
                step=step,
                mu_gradient=parts.mu_gradient,
                health=parts.health,
            )
    row = {
        "step": step,
        **({"mu": inputs.mu} if inputs.mu is not None else {}),
        "loss": done.result.loss,
        **done.result.means,
        **done.result.maxima,
        **({"compared_tokens": round(tokens)} if (tokens := done.result.compared.get("tokens")) else {}),
        **{f"num_{term}_tokens": sum(u.counts.get(term, 0) for u in inputs.updates) for term in parts.terms},
        **inputs.stats,
        **({"grad_norm": done.grad_norm} if done.grad_norm is not None else {}),
        **({"grad_norm_ratio": done.grad_norm_ratio} if done.grad_norm_ratio is not None else {}),
        "zero_gradient": done.zero_gradient,
        "skipped_updates": done.num_skipped,
        "learning_rate": done.learning_rate,
        "weight_version": inputs.weight_version,
        "micro_batches": sum(len(batches) for batches in micro_batches),
    }
    broken = not_finite(done.result)
    row = {name: value for name, value in row.items() if name not in broken}
    if broken:
        row["not_finite"] = broken
    if coordinator is not None:
        coordinator.commit(step)
        seconds = {**timer.seconds, **inputs.seconds}
        row |= {
            "tokens_per_s": inputs.num_tokens / seconds["total"],
            **_throughput(parts, inputs, seconds["train"]),
            **held_gpus(parts.state.groups.world_size),
            "seconds": seconds | {"sync": parts.engine.take_sync_seconds()},
        }
        coordinator.log.finish_step(row, step_line(row, run.steps))
    mu = inputs.mu
    if schedule is None or mu is None or done.num_skipped:
        return now.memory  # a skipped update does not change the memory of the schedule
    # All ranks use rank 0's memory: mu decides whether a step samples, so it must be equal on all ranks, bit for bit.
    return state.groups.once(lambda: dict(schedule.remember(now, mu, row)))


def collect(parts: RunContext, now: ScheduleInput) -> CollectedStep:
    """Push weights and collect the step ``now``. The collection of later steps may still run when this returns.

    If a rollout server is lost, it is called again from the beginning.
    """
    rollout = parts.run.rollout
    lag = rollout.max_off_policy_steps
    parts.queue.forget_lost(parts.engine.generation)
    _push_and_start(parts, now, through=now.step + lag if rollout.in_flight == "keep" else now.step)
    _doing(parts.coordinator, "collecting")
    collected = parts.queue.wait(now.step)
    _push_and_start(parts, now, through=now.step + lag)
    return collected


def _push_and_start(parts: RunContext, now: ScheduleInput, *, through: int) -> None:
    """Start to collect the steps up to ``through`` that are not in the queue yet, with the weights of step ``now``.

    Weights are pushed only if one of these steps samples.
    """
    steps = parts.queue.not_started(now, through=through)
    samples = [parts.method.needs_rollouts_at(parts.run, step) for step in steps]
    if any(samples):
        parts.engine.push_weights(parts.state, now.step)
    for step, does_sample in zip(steps, samples, strict=True):
        parts.queue.start(step, parts.engine.clients if does_sample else (), version=now.step)


def _throughput(parts: RunContext, inputs: StepInputs, seconds: float) -> dict[str, float]:
    trained = {name for update in inputs.updates for name in update.counts}
    forward = num_forward_passes(parts.terms[name] for name in trained)
    return throughput(
        parts.state.shape,
        tokens=inputs.num_tokens,
        squared_tokens=inputs.squared_tokens,
        passes=parts.run.batch.epochs + forward / 3,
        seconds=seconds,
        ranks=parts.state.groups.world_size,
        gpu=own_gpu(),
    )


def _evaluate(parts: RunContext, version: int) -> bool:
    """Evaluate the weights after ``version`` optimizer steps on the held-out problems, if there are any.

    Returns:
        whether they are the best weights so far; false without ``checkpoint.keep_best``.
    """
    coordinator = parts.coordinator
    has_problems = parts.run.data.evaluation is not None
    if not has_problems:
        return False
    _drain(parts)

    def measure() -> Any:
        assert coordinator is not None
        coordinator.log.doing("evaluating")
        return coordinator.evaluate(parts.engine.clients, version)

    def push_and_measure() -> Any:
        parts.engine.push_weights(parts.state, version)
        return parts.state.groups.once(measure)

    with parts.state.groups.pulse.phase("evaluating"):
        result = parts.engine.attempt(push_and_measure)
    if coordinator is not None:
        coordinator.log.write({"step": version, "evaluation": asdict(result)})
        coordinator.log.say(
            f"evaluation after {version} steps: accuracy {100 * result.accuracy:.1f} % "
            f"on {result.num_problems} problems"
        )
    name = parts.run.checkpoint.keep_best
    if name is None or version == 0:
        return False
    try:
        return parts.best.note(version, value_of(result, name))
    except ValueError as error:
        _say(coordinator, f"this evaluation does not count for the best checkpoint: {error}")
        return False


def _save(parts: RunContext, step: int, memory: Memory) -> None:
    coordinator = parts.coordinator
    _drain(parts)
    _doing(coordinator, "saving")
    if parts.engine.has_offloaded:  # after an evaluation, or after sampling that was interrupted
        parts.engine.rest()
    run_state = coordinator.run_state(step, memory) if coordinator is not None else {}
    run_state |= {"health": parts.health.to_json(), "best": parts.best.to_json()}
    with parts.state.groups.pulse.phase("saving"):
        path = checkpoint.save(
            parts.state,
            run_state,
            parts.run.output / CHECKPOINTS,
            keep=parts.run.checkpoint.keep,
            best=parts.best.step,
            notify=partial(_say, coordinator),
        )
    if coordinator is not None:
        coordinator.log.say(f"checkpoint {path}")


def _drain(parts: RunContext) -> None:
    if parts.run.rollout.asynchronous is not None:
        _doing(parts.coordinator, "waiting for requests under way")
    with parts.state.groups.pulse.phase("collecting"):
        parts.queue.drain()


def _resume(parts: RunContext, path: Path) -> tuple[int, Memory]:
    """Load weights, optimizer and cursors from a checkpoint. Returns the number of steps done and mu's memory."""
    _doing(parts.coordinator, "loading the checkpoint")
    run_state = checkpoint.load(parts.state, path)
    check_finite(parts.state, f"{path} cannot be continued; move it away to continue from the previous one")
    parts.health.restore(run_state.get("health"))
    parts.best.restore(run_state.get("best"))
    _forget_lost_best(parts)

    def restore() -> None:
        assert parts.coordinator is not None
        parts.coordinator.restore(run_state)
        parts.coordinator.log.say(f"resumed from {path}: {run_state['step']} of {parts.run.steps} steps done")

    parts.state.groups.once(restore)
    parts.queue.restore(run_state)
    schedule, step = parts.method.schedule(parts.run), run_state["step"]
    if schedule is not None:
        _check_memory(schedule, ScheduleInput(step=step, memory=run_state["mu"]), path)
        restart_schedule(parts.state, _last_reset(parts.method, parts.run, step))
    return run_state["step"], run_state["mu"]


def _forget_lost_best(parts: RunContext) -> None:
    """If the best checkpoint was removed, no checkpoint is the best until an evaluation is better than it was."""
    best, folder = parts.best, parts.run.output / CHECKPOINTS
    if best.step is None or parts.run.checkpoint.keep_best is None:
        return
    path = folder / f"step-{best.step:06d}"
    if not parts.state.groups.once(path.is_dir):
        _say(
            parts.coordinator,
            f"the best checkpoint, {path}, is gone; a better evaluation is needed to keep another",
        )
        best.step = None


def _check_memory(schedule: MuSchedule, now: ScheduleInput, path: Path) -> None:
    try:
        schedule.value(replace(now, reward_mean=0.0))
    except KeyError as error:
        raise ValueError(
            f"{path} was written with another schedule of mu: it does not have {error}, which "
            f"{schedule.schedule} needs"
        ) from None


def _make_coordinator(
    run: RunConfig,
    method: Method,
    data: RunData,
    layout: Layout,
    found: Path | None,
    stack: ExitStack,
    stop_wanted: Callable[[], bool],
    pulse: Pulse,
) -> Coordinator:
    first_step = checkpoint.step_of(found) if found is not None else 0
    if first_step > run.steps:
        raise ValueError(f"{found} already has {first_step} steps, but steps is {run.steps}")
    log = stack.enter_context(
        RunLog(run.output, steps=run.steps, first_step=first_step, settings=plain_settings(run))
    )
    graders = stack.enter_context(
        Graders(run.reward, on_grade=lambda: pulse.helped("collecting", "evaluating"))
    )
    for report in data.reports:
        log.say(report)
    if data.left_out:
        log.say(f"left out    {len(data.left_out)} rows, each with its reason in {run.output / DROPPED}")
    return Coordinator(
        run, method, data, layout=layout, graders=graders, log=log, stop_wanted=stop_wanted, pulse=pulse
    )


def _tell_outcome(log: RunLog, folder: Path) -> None:
    log.say(f"trained policy in {folder / POLICY}")
    table = summary(read_metrics(folder))
    if table is not None:
        log.console.print(table)


def _report(claimed: Claim) -> None:
    """Write the HTML report of the run. An error here is printed and does not fail the run."""
    if not claimed.has_begun:
        return
    try:
        print(f"report in {write_report([claimed.folder], claimed.folder / REPORT)}", flush=True)
    except Exception as error:
        print(f"no report was written: {type(error).__name__}: {error}", flush=True)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn a ValueError before the first step into ``Refused``, because the user can correct its cause."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


def _say(coordinator: Coordinator | None, text: str) -> None:
    if coordinator is not None:
        coordinator.log.say(text)


def _doing(coordinator: Coordinator | None, what: str) -> None:
    if coordinator is not None:
        coordinator.log.doing(what)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
