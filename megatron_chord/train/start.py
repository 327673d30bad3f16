"""The start of a run: claim the folder, read the data, start the servers, build the model, load a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_chord.config import RunConfig
from megatron_chord.config_io import plain_settings
from megatron_chord.families.shape import ModelShape
from megatron_chord.methods.base import Method
from megatron_chord.precision import preset
from megatron_chord.report.page import REPORT, write_report
from megatron_chord.rewards.graders import Graders, check_reward
from megatron_chord.runtime.heartbeat import Watch
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.schedules import Memory, MuSchedule, ScheduleInput
from megatron_chord.train import checkpoint
from megatron_chord.train.context import RunContext
from megatron_chord.train.coordinator import Coordinator
from megatron_chord.train.engine import RolloutEngine
from megatron_chord.train.evaluate import due_sets
from megatron_chord.train.folder import CHECKPOINTS, LOGS, Claim, Resume, claim
from megatron_chord.train.health import Health
from megatron_chord.train.learned_mu import MuGradient
from megatron_chord.train.metrics import DROPPED, RunLog, write_left_out
from megatron_chord.train.router_replay import wanted_routes
from megatron_chord.train.sanity import check_finite
from megatron_chord.train.saver import Saver
from megatron_chord.train.schedule_change import schedule_change
from megatron_chord.train.segments import check_changes, settings_before
from megatron_chord.train.setup import (
    RunData,
    can_share_prompts,
    load_data,
    needs_servers,
    packing_layout,
    plan_lines,
    reference_folder,
)
from megatron_chord.train.state import build_state, restart_schedule, with_averaged, with_second_adam
from megatron_chord.train.step_queue import StepQueue
from megatron_chord.train.watch import clear_leftovers, start_watch

UNEVALUATED = "unevaluated"
"""Key of a checkpoint's run state: whether a stop interrupted the evaluation of its weights."""


class Refused(ValueError):
    """Settings, data or a checkpoint are not valid. Nothing has been trained."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run starts. ``loop.train`` describes the fields."""

    resume: Resume
    overwrite: bool
    allow_changed: bool
    stop_wanted: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Started:
    context: RunContext
    step: int
    """Number of steps that are done: 0, or those of the checkpoint."""
    memory: Memory
    """The memory of mu's schedule after these steps."""
    chat_template: str | None
    """The chat template to export with the policy; None if there is none, and on all ranks but the coordinator."""
    evaluates_first: bool
    """True if an evaluation is due before the first step: that of the start, or one that a stop interrupted."""


def start_run(
    run: RunConfig,
    shape: ModelShape,
    method: Method,
    groups: ParallelGroups,
    how: Start,
    stack: ExitStack,
) -> Started:
    """Do everything that comes before the first step. ``stack`` closes what was opened. Called on every rank.

    Raises:
        Refused: settings, data or a checkpoint are not valid; the run's folder is then as it was.
    """
    watch = start_watch(run, groups)
    if watch is not None:
        stack.callback(watch.close)
    local = _OnCoordinator(run, shape, method, groups, how, stack)
    with refusing():
        groups.once(lambda: local.read(watch))
        saved = _find(run.output / CHECKPOINTS, how.resume, groups)
        groups.once(lambda: local.open(saved))
        context = _build(run, shape, method, groups, local.coordinator, how.stop_wanted, stack)
        run_state = _resume(context, saved) if saved is not None else {}
        step, memory = run_state.get("step", 0), run_state.get("mu", {})
        evaluates_first = run_state.get(UNEVALUATED, saved is None) and bool(due_sets(run, step))
        groups.once(lambda: local.begin(step, evaluates_first=evaluates_first))
    template = local.data.template.exported if local.data is not None else None
    return Started(
        context=context, step=step, memory=memory, chat_template=template, evaluates_first=evaluates_first
    )


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a ValueError before the first step into ``Refused``, because the user can correct its cause."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


@dataclass
class _OnCoordinator:
    """The coordinator's part of the start. On the other ranks the fields with a default stay None."""

    run: RunConfig
    shape: ModelShape
    method: Method
    groups: ParallelGroups
    how: Start
    stack: ExitStack
    claimed: Claim | None = None
    data: RunData | None = None
    coordinator: Coordinator | None = None

    def read(self, watch: Watch | None) -> None:
        """Read the data and claim the run's folder. Remove what a killed run left there."""
        run = self.run
        check_reward(run.reward)
        self.data = load_data(run, self.shape)
        self.claimed = claim(run, resume=self.how.resume, overwrite=self.how.overwrite)
        # The report is written after servers and logs are closed, also after an error.
        self.stack.callback(_report, self.claimed)
        self.stack.enter_context(self.claimed)
        clear_leftovers(run.output, watch)
        checkpoint.clear_partial(run.output / CHECKPOINTS, print)

    def open(self, saved: Path | None) -> None:
        """Open the log and the graders, make the coordinator and print the plan.

        Args:
            saved: the checkpoint from which the run continues.
        """
        assert self.data is not None
        run, method = self.run, self.method
        first_step = checkpoint.step_of(saved) if saved is not None else 0
        changed = _changed(run, method, first_step, self.how.allow_changed) if saved is not None else []
        if first_step > run.steps:
            raise ValueError(f"{saved} already has {first_step} steps, but steps is {run.steps}")
        log = self.stack.enter_context(
            RunLog(run.output, steps=run.steps, first_step=first_step, settings=plain_settings(run))
        )
        pulse = self.groups.pulse
        graders = self.stack.enter_context(
            Graders(run.reward, on_grade=lambda: pulse.progress_elsewhere("collecting", "evaluating"))
        )
        for line in self.data.reports:
            log.say(line)
        if self.data.left_out:
            log.say(
                f"left out    {len(self.data.left_out)} rows, each with its reason in {run.output / DROPPED}"
            )
        parallel, fp8 = run.parallel, preset(run.precision).training
        self.coordinator = Coordinator(
            run,
            method,
            self.data,
            layout=packing_layout(
                self.shape,
                parallel,
                self.groups.data.size,
                fp8,
                shares_prompts=run.batch.share_prompts and can_share_prompts(self.shape, parallel),
            ),
            graders=graders,
            log=log,
            stop_wanted=self.how.stop_wanted,
            pulse=pulse,
        )
        if changed:
            log.say("\n".join(changed))
        if self.how.resume == "auto" and saved is None:
            log.say(f"no checkpoint in {run.output / CHECKPOINTS}: starting at step 0")
        plan_lines(run, self.shape, method, self.groups.world_size, log.say)

    def begin(self, step: int, *, evaluates_first: bool) -> None:
        """Take over the folder for this run, after all checks have passed. The run continues after ``step`` steps."""
        assert self.claimed is not None
        assert self.coordinator is not None
        assert self.data is not None
        log = self.coordinator.log
        self.claimed.begin(first_step=step)
        log.begin(evaluates_first=evaluates_first)
        write_left_out(self.claimed.folder, self.data.left_out)
        if self.how.resume not in ("never", "auto"):
            checkpoint.set_aside(self.claimed.folder / CHECKPOINTS, after=step, notify=log.say)


def _find(folder: Path, resume: Resume, groups: ParallelGroups) -> Path | None:
    """The checkpoint from which the run continues; None to start from the beginning. Called on every rank."""
    if resume == "never":
        return None
    if resume == "auto":
        return checkpoint.find(folder, print, groups)
    return checkpoint.find_named(folder, resume, print, groups)


def _changed(run: RunConfig, method: Method, done: int, allowed: bool) -> list[str]:
    """Lines about the settings that differ from those of the checkpoint after ``done`` steps.

    Raises:
        ValueError: a difference is not allowed.
    """
    before = settings_before(run.output, done)
    remark = schedule_change(before, run, step=done, since=_last_reset(method.schedule(), done))
    return check_changes(before, plain_settings(run), allowed=allowed, remarks=[remark] if remark else [])


def _last_reset(schedule: MuSchedule | None, step: int) -> int:
    """The last step before ``step`` at which the learning-rate schedule was reset."""
    return 0 if schedule is None else max(filter(schedule.resets_optimizer, range(step)), default=0)


def _build(
    run: RunConfig,
    shape: ModelShape,
    method: Method,
    groups: ParallelGroups,
    coordinator: Coordinator | None,
    stop_wanted: Callable[[], bool],
    stack: ExitStack,
) -> RunContext:
    """Start the servers and build model and optimizer. ``stack`` closes them. Called on every rank."""
    log = coordinator.log if coordinator is not None else None
    # The server loads while the model is built, unless it shares the ranks' GPUs.
    engine = RolloutEngine(
        run,
        groups,
        is_needed=needs_servers(run, method),
        log_folder=run.output / LOGS,
        notify=log.say if log is not None else _silent,
        doing=log.doing if log is not None else _silent,
        stop_wanted=stop_wanted,
    )
    stack.callback(engine.close)
    terms = method.all_terms(run.resolved_objective(), run.batch)
    if log is not None:
        log.doing("building the model")
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
    state = with_second_adam(state, method.extra_rate())
    state = with_averaged(state, method.averaging_rate())
    servers = engine if wanted_routes(run, shape) is not None else None
    queue = StepQueue(run, groups, coordinator, servers=servers, stop_wanted=stop_wanted)
    stack.callback(queue.close)
    saver = Saver(run.output / CHECKPOINTS, run.checkpoint, groups, log.say if log is not None else _silent)
    stack.callback(saver.close)
    schedule = method.schedule()
    return RunContext(
        run=run,
        method=method,
        terms=terms,
        state=state,
        engine=engine,
        queue=queue,
        saver=saver,
        coordinator=coordinator,
        mu_gradient=MuGradient() if schedule is not None and schedule.needs_mu_gradient else None,
        health=Health(),
    )


def _silent(text: str) -> None:
    pass


def _resume(context: RunContext, path: Path) -> dict[str, Any]:
    """Load weights, optimizer and cursors from a checkpoint. Returns its run state."""
    context.doing("loading the checkpoint")
    run_state = checkpoint.load(context.state, path)
    check_finite(context.state, f"{path} cannot be continued; move it away to continue from the previous one")
    context.health.restore(run_state.get("health"))
    context.best.restore(run_state.get("best"))
    _forget_lost_best(context)

    def restore() -> None:
        assert context.coordinator is not None
        context.coordinator.restore(run_state)
        context.coordinator.log.say(
            f"resumed from {path}: {run_state['step']} of {context.run.steps} steps done"
        )

    context.state.groups.once(restore)
    context.queue.restore(run_state)
    schedule, step = context.method.schedule(), run_state["step"]
    if schedule is not None:
        _check_memory(schedule, ScheduleInput(step=step, memory=run_state["mu"]), path)
        restart_schedule(context.state, _last_reset(schedule, step))
    return run_state


def _forget_lost_best(context: RunContext) -> None:
    """If the best checkpoint was removed, no checkpoint counts as the best until an evaluation is better than that
    one."""
    best, folder = context.best, context.run.output / CHECKPOINTS
    if best.step is None or context.run.checkpoint.keep_best is None:
        return
    path = folder / f"step-{best.step:06d}"
    if not context.state.groups.once(path.is_dir):
        context.say(
            f"the best checkpoint, {path}, does not exist any more. A checkpoint is kept as the best only after an "
            "evaluation that is better than that one",
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


def _report(claimed: Claim) -> None:
    """Write the HTML report of the run. An error here is printed and does not fail the run."""
    if not claimed.has_begun:
        return
    try:
        print(f"report in {write_report([claimed.folder], claimed.folder / REPORT)}", flush=True)
    except Exception as error:
        print(f"no report was written: {type(error).__name__}: {error}", flush=True)
