"""The log of a run's metrics: metrics.jsonl (always complete), trackers and the console. Coordinator only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_chord.files import write_whole
from megatron_chord.judgement import Judge
from megatron_chord.settings_tree import setting
from megatron_chord.train.tags import scalars, tagged
from megatron_chord.train.trackers import ANSWERS_EVERY, END_S, TrackedRun, Trackers, answer_table

METRICS = "metrics.jsonl"
SAMPLES = "samples"
DROPPED = "dropped.jsonl"
_LEAVING_S = 3.0
"""Seconds that a run which ends early waits for its trackers."""


class RunLog:
    """Writes each step as a JSON line, to the trackers and as a console line, and prints warnings."""

    def __init__(self, folder: Path, *, steps: int, first_step: int, settings: Mapping[str, Any]) -> None:
        """Nothing in ``folder`` changes before ``begin``. ``settings`` are the run's settings as in config.yaml."""
        self._folder = folder
        self._path = folder / METRICS
        self._samples = folder / SAMPLES
        self._held_samples: list[tuple[int, list[dict[str, Any]], str]] | None = []
        """Step, rows and kind of the samples that ``begin`` writes; None after it."""
        self._first_step = first_step
        self._judge = Judge(settings=settings)
        self._settings = settings
        self._trackers: Trackers | None = None
        self.console = Console()
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=steps, completed=first_step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._trackers is not None:
            self._trackers.close(wait_s=END_S if kind is None else _LEAVING_S)

    def begin(self, *, evaluates_first: bool = False) -> None:
        """Open the folder's log to append. Lines of the first step and later ones, from an earlier run, are removed.

        With ``evaluates_first`` this run begins with the evaluation after ``first_step`` steps, so the line of an
        earlier one is removed, too.
        """
        _keep_steps_before(self._path, self._first_step, with_evaluation=not evaluates_first)
        for row in read_metrics(self._folder):
            if "evaluation" not in row:
                self._judge.add(row)  # its findings were printed by the earlier run
        self._samples.mkdir(exist_ok=True)
        for path in self._samples.glob("*-*.jsonl"):
            kind, step = path.stem.rsplit("-", 1)
            if int(step) >= self._first_step + (kind == "evaluation"):
                path.unlink()
        run = TrackedRun(folder=self._folder, settings=self._settings, first_step=self._first_step)
        self._trackers = Trackers(setting(self._settings, "tracking", ()), run, self.say)
        held, self._held_samples = self._held_samples or (), None
        for step, rows, kind in held:
            self.write_samples(step, rows, kind=kind)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row with a ``step``. Raises FloatingPointError if a number is not finite (not valid JSON)."""
        broken = [name for name, value in scalars(row) if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"step {row['step']}: not finite: {', '.join(broken)}")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        assert self._trackers is not None, "begin must be called first"
        self._trackers.log(row["step"], tagged(row))

    def finish_step(self, row: Mapping[str, Any], line: str) -> None:
        self.write(row)
        self.say(line)
        for finding in self._judge.add(row):
            self.say(str(finding))
        self._progress.update(self._task, completed=row["step"] + 1)

    def write_samples(self, step: int, rows: list[dict[str, Any]], *, kind: str = "step") -> None:
        """Write the rollouts of a step or of an evaluation.

        Before ``begin`` they are kept in memory, and ``begin`` writes them. This happens when a resumed run collects
        the steps that were sampled ahead: at that time its settings can still be refused.
        """
        if self._held_samples is not None:
            self._held_samples.append((step, rows, kind))
            return
        path = self._samples / f"{kind}-{step:06d}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        if self._trackers is not None and (kind == "evaluation" or step % ANSWERS_EVERY == 0):
            self._trackers.log_answers(step, answer_table(kind, step, rows))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    return list(_rows(path)) if path.is_file() else []


def write_left_out(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of data that a run does not use, with the reasons. If the run uses all rows, no file is
    written."""
    path = folder / DROPPED
    if rows:
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def _keep_steps_before(path: Path, first_step: int, *, with_evaluation: bool) -> None:
    if not path.is_file():
        return
    kept = [row for row in _rows(path) if _is_before(row, first_step, with_evaluation=with_evaluation)]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, without a last line that is incomplete because of a crash."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a row of metrics: {error}") from error


def _is_before(row: Mapping[str, Any], first_step: int, *, with_evaluation: bool) -> bool:
    # The `step` of an evaluation is the number of optimizer steps of the evaluated weights.
    is_last_evaluation = "evaluation" in row and 0 < first_step == row["step"]
    return row["step"] < first_step or (with_evaluation and is_last_evaluation)
