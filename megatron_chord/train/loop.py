"""The run: collect, step, measure, evaluate, save; and at the end the trained policy as a folder."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_chord.config import RunConfig
from megatron_chord.config_io import dump_config
from megatron_chord.losses.mu import mu_at
from megatron_chord.rewards.pool import GraderPool
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train import checkpoint
from megatron_chord.train.coordinator import Coordinator
from megatron_chord.train.engine import RolloutEngine
from megatron_chord.train.export import export_policy
from megatron_chord.train.metrics import METRICS, SAMPLES, TENSORBOARD, RunLog, Timer, read_metrics
from megatron_chord.train.report import step_line, summary
from megatron_chord.train.setup import (
    RunData,
    check_run,
    coordinator_timeout_s,
    layout_of,
    load_data,
    plan_lines,
)
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.step import StepResult, apply_gradients, compute_gradients

Resume = Literal["never", "auto"]
POLICY = "policy"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
CONFIG = "config.yaml"
_MAX_GAP = {"fp32": 1e-3, "bf16": 5e-2}


class Refused(ValueError):
    """Settings, data or a checkpoint that will not do; nothing has been trained."""


class LogprobMismatch(RuntimeError):
    """Trainer and rollout engine disagree on the probability of the same tokens."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    run: RunConfig
    state: TrainState
    engine: RolloutEngine
    coordinator: Coordinator | None
    """On rank 0 only."""


def train(
    run: RunConfig,
    *,
    resume: Resume = "never",
    overwrite: bool = False,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Run ``run`` to its end on this rank; the same call on every rank of the world.

    ``check_stop`` is called before every step and raises to end the run.

    Raises:
        Refused: settings, data or a checkpoint that will not do, before any work.
    """
    with _refusing():
        shape = check_run(run, runtime.world_size_of_environment())
    groups = runtime.start(run.parallel, seed=run.seed, coordinator_timeout_s=coordinator_timeout_s(run))
    with ExitStack() as stack:
        stack.callback(runtime.stop)
        coordinator: Coordinator | None = None

        @_refusing()
        def prepare() -> Path | None:
            nonlocal coordinator
            data = load_data(run)
            stack.enter_context(_claim(run, resume=resume, overwrite=overwrite))
            coordinator, found = _make_coordinator(run, data, groups, resume, stack)
            plan_lines(run, shape, groups.world_size, coordinator.log.say)
            return found

        saved = groups.once(prepare)
        # The server loads while the model is built.
        say = coordinator.log.say if coordinator is not None else lambda text: None
        with _refusing():
            engine = RolloutEngine(run, groups, log_folder=run.output / LOGS, notify=say)
            stack.callback(engine.close)
            state = build_state(shape, run.model, run.parallel, run.optim, groups=groups, steps=run.steps)
            parts = _Parts(run=run, state=state, engine=engine, coordinator=coordinator)
            done = _resume(parts, saved) if saved is not None else 0
        if done == 0:
            _evaluate(parts, 0)
        for step in range(done, run.steps):
            check_stop()
            _step(parts, step)
            if _is_due(run.evaluation.every, step + 1) or step + 1 == run.steps:
                _evaluate(parts, step + 1)
            if _is_due(run.checkpoint.every, step + 1) or step + 1 == run.steps:
                _save(parts, step + 1)
        export_policy(state, run.model.path, run.output / POLICY, chat_template=run.data.chat_template)
        if coordinator is not None:
            coordinator.log.say(f"trained policy in {run.output / POLICY}")
            table = summary(read_metrics(run.output))
            if table is not None:
                coordinator.log.console.print(table)


def _step(parts: _Parts, step: int) -> None:
    """One optimizer step; on the coordinator also its metrics."""
    run, state, coordinator = parts.run, parts.state, parts.coordinator
    mu = mu_at(step, run.objective.mu)
    timer = Timer()
    with timer.phase("total"):
        with timer.phase("collect"):

            def collect(clients: Any, version: int) -> Any:
                assert coordinator is not None
                return coordinator.collect(step, mu, clients, version)

            if mu < 1 and run.batch.prompts:
                inputs, micro_batches = parts.engine.use(collect, state, version=step)
            else:
                inputs, micro_batches = state.groups.from_coordinator(lambda: collect([], step))
        _doing(coordinator, "training")
        with timer.phase("train"):
            result = compute_gradients(
                state,
                micro_batches,
                inputs.weights,
                run.objective,
                temperature=run.rollout.temperature,
            )
            _check_gap(run, result, step)
            grad_norm, learning_rate = apply_gradients(state)
    if coordinator is None:
        return
    coordinator.commit()
    seconds = timer.seconds | inputs.seconds
    row = {
        "step": step,
        "mu": mu,
        "loss": result.loss,
        **result.means,
        **result.maxima,
        "num_policy_tokens": inputs.weights.num_policy_tokens,
        "num_expert_tokens": inputs.weights.num_expert_tokens,
        **inputs.stats,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "weight_version": step,
        "micro_batches": len(micro_batches),
        "tokens_per_s": inputs.num_tokens / seconds["total"],
        "seconds": seconds | {"sync": parts.engine.take_sync_seconds()},
    }
    coordinator.log.finish_step(row, step_line(row, run.steps))


def _check_gap(run: RunConfig, result: StepResult, step: int) -> None:
    """Before the update: a gap means wrong weights, wrong temperature or a shifted log-prob somewhere."""
    gap = result.means.get("logprob_gap")
    dtypes = {run.model.dtype, run.rollout.dtype or run.model.dtype}
    limit = run.rollout.max_logprob_gap
    if limit is None:
        limit = max(_MAX_GAP[dtype] for dtype in dtypes)
    if gap is not None and not gap <= limit:
        raise LogprobMismatch(
            f"step {step}: trainer and rollout log-probs of the same tokens differ by {gap:.2e} on average "
            f"(at most {result.maxima['logprob_gap_max']:.2e}); rollout.max_logprob_gap is {limit:.0e}. "
            "Nothing was trained on them"
        )


def _evaluate(parts: _Parts, version: int) -> None:
    """Held-out accuracy of the weights after ``version`` optimizer steps."""
    coordinator = parts.coordinator
    has_problems = parts.run.data.evaluation is not None
    if not has_problems:
        return
    _doing(coordinator, "evaluating")

    def work(clients: Any, version: int) -> Any:
        assert coordinator is not None
        return coordinator.evaluate(clients, version), None

    result, _ = parts.engine.use(work, parts.state, version=version)
    if coordinator is not None:
        coordinator.log.write({"step": version, "evaluation": asdict(result)})
        coordinator.log.say(
            f"evaluation after {version} steps: accuracy {100 * result.accuracy:.1f} % "
            f"on {result.num_problems} problems"
        )


def _save(parts: _Parts, step: int) -> None:
    coordinator = parts.coordinator
    _doing(coordinator, "saving")
    run_state = coordinator.run_state(step) if coordinator is not None else {}
    path = checkpoint.save(
        parts.state, run_state, parts.run.output / CHECKPOINTS, keep=parts.run.checkpoint.keep
    )
    if coordinator is not None:
        coordinator.log.say(f"checkpoint {path}")


def _resume(parts: _Parts, path: Path) -> int:
    """Weights, optimizer and cursors from a checkpoint; returns the optimizer steps done."""
    run_state = checkpoint.load(parts.state, path)

    def restore() -> None:
        assert parts.coordinator is not None
        parts.coordinator.restore(run_state)
        parts.coordinator.log.say(f"resumed from {path}: {run_state['step']} of {parts.run.steps} steps done")

    parts.state.groups.once(restore)
    return run_state["step"]


def _make_coordinator(
    run: RunConfig, data: RunData, groups: runtime.ParallelGroups, resume: Resume, stack: ExitStack
) -> tuple[Coordinator, Path | None]:
    found = checkpoint.find(run.output / CHECKPOINTS, print) if resume == "auto" else None
    first_step = checkpoint.step_of(found) if found is not None else 0
    if first_step > run.steps:
        raise ValueError(f"{found} has taken {first_step} steps already, but steps is {run.steps}")
    log = stack.enter_context(RunLog(run.output, steps=run.steps, first_step=first_step))
    graders = stack.enter_context(
        GraderPool(
            run.reward.kind,
            workers=run.reward.workers,
            timeout_s=run.reward.timeout_s,
            memory_mb=run.reward.memory_mb,
            marker=run.reward.answer_marker,
        )
    )
    for report in data.reports:
        log.say(report)
    if resume == "auto" and found is None:
        log.say(f"no checkpoint in {run.output / CHECKPOINTS}: starting at step 0")
    layout = layout_of(run.parallel, groups.data.size)
    return Coordinator(run, data, layout=layout, graders=graders, log=log), found


def _claim(run: RunConfig, *, resume: Resume, overwrite: bool) -> Any:
    """Make the run folder ours, or say why not. The lock goes with the process, however it ends."""
    run.output.mkdir(parents=True, exist_ok=True)
    lock = (run.output / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {run.output}") from None
    if (run.output / CONFIG).exists() and resume == "never":
        if not overwrite:
            raise ValueError(
                f"{run.output} already holds a run: choose another output, continue it with --resume auto, "
                "or replace it with --overwrite"
            )
        for name in (METRICS, SAMPLES, TENSORBOARD, CHECKPOINTS, LOGS, POLICY):
            path = run.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (run.output / LOGS).mkdir(exist_ok=True)
    (run.output / CONFIG).write_text(dump_config(run), encoding="utf-8")
    return lock


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong before the first step is the user's to mend, and is told apart from a fault in a later one."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


def _doing(coordinator: Coordinator | None, what: str) -> None:
    if coordinator is not None:
        coordinator.log.doing(what)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
