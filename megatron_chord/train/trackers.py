"""TensorBoard, Weights & Biases, MLflow, SwanLab and Trackio behind one small interface.

Each tracker runs in a separate thread. So a tracker that is slow or not reachable neither stops nor slows a run, and
metrics.jsonl is always complete.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_chord.settings_tree import flat

TENSORBOARD = "tensorboard"
PROJECT = "megatron_chord"
_MOST_WAITING = 10_000
"""Maximum number of rows that wait for a tracker. If there are more, the tracker is switched off."""
END_S = 60.0
"""How long the end of a run waits for all trackers together."""
ANSWERS_EVERY = 10
"""Number of training steps between two tables of answers. Every evaluation has a table."""
_MOST_ANSWERS, _MOST_OF_A_PROMPT = 16, 4
"""Maximum number of rows of a table."""
_LONGEST = 2000
"""Maximum number of characters of a text in a table."""

Values = Mapping[str, float]
Cell = str | float | None


@dataclass(frozen=True, kw_only=True)
class AnswerTable:
    name: str
    """``evaluation`` or ``step``."""
    rows: Sequence[Sequence[Cell]]
    columns: tuple[str, ...] = ("step", "prompt", "answer", "truth", "reward", "tokens", "finish")

    @property
    def tag(self) -> str:
        return f"answers/{self.name}"


def answer_table(name: str, step: int, samples: Sequence[Mapping[str, Any]]) -> AnswerTable:
    """The first answers of a file of ``samples/``: a few of each prompt. Long texts are cut."""
    of_prompt: Counter[Any] = Counter()
    rows: list[Sequence[Cell]] = []
    for sample in samples:
        of_prompt[sample["prompt_id"]] += 1
        if len(rows) < _MOST_ANSWERS and of_prompt[sample["prompt_id"]] <= _MOST_OF_A_PROMPT:
            texts = [str(sample[key])[:_LONGEST] for key in ("prompt", "response", "truth")]
            rows.append((step, *texts, sample["reward"], sample["num_tokens"], sample["finish_reason"]))
    return AnswerTable(name=name, rows=rows)


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    folder: Path
    settings: Mapping[str, Any]
    """The settings of the run, as in config.yaml."""
    first_step: int

    @property
    def name(self) -> str:
        return self.folder.name


class Tracker(Protocol):
    def log(self, step: int, values: Values) -> None: ...
    def log_answers(self, step: int, table: AnswerTable) -> None: ...
    def close(self) -> None: ...


Entry = Callable[[Tracker], None]


def check_installed(names: Sequence[str]) -> None:
    """Raises ValueError if the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracking: {name} is not installed here; pip install {name}")


class Trackers:
    """All trackers of a run."""

    def __init__(self, names: Sequence[str], run: TrackedRun, notify: Callable[[str], None]) -> None:
        """``notify`` is called from other threads, at most once for each tracker that fails."""
        self._notify = notify
        self._threads = [_Thread(name, lambda open_=_OPEN[name]: open_(run), notify) for name in names]

    def log(self, step: int, values: Values) -> None:
        """Pass the values of a step to all trackers, without waiting for them."""
        for thread in self._threads:
            thread.put(lambda tracker: tracker.log(step, values))

    def log_answers(self, step: int, table: AnswerTable) -> None:
        """Pass a table of answers to all trackers, without waiting for them."""
        for thread in self._threads:
            thread.put(lambda tracker: tracker.log_answers(step, table))

    def close(self, *, wait_s: float = END_S) -> None:
        """Wait until all trackers have received all values, but at most ``wait_s`` seconds."""
        for thread in self._threads:
            thread.put(None)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._notify(
                    f"tracking: {thread.name} did not finish in {wait_s:.0f} s; the run ends without it"
                )


class _Thread(threading.Thread):
    def __init__(self, name: str, start: Callable[[], Tracker], notify: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._open = start
        self._say = notify
        self._waiting: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._has_failed = False
        self.start()

    def put(self, item: Entry | None) -> None:
        """Pass a row, a table, or None to end. None is passed also if too many rows wait, so that the tracker is
        closed."""
        if item is not None:
            if not self._has_failed and self._waiting.qsize() >= _MOST_WAITING:
                self._fail(f"{_MOST_WAITING} rows wait for it")
            if self._has_failed:
                return
        self._waiting.put(item)

    def run(self) -> None:
        try:
            tracker = self._open()
            while (item := self._waiting.get()) is not None:
                item(tracker)
            tracker.close()
        except BaseException as error:  # some call sys.exit
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            lines = reason.splitlines() or [""]
            self._say(f"tracking: {self.name} is switched off: {lines[0]}")


# ---- one small class each


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / TENSORBOARD), purge_step=run.first_step)
        rows = "".join(f"| {name} | {value} |\n" for name, value in flat(run.settings).items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", run.first_step)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_answers(self, step: int, table: AnswerTable) -> None:
        """Do nothing, because TensorBoard has no tables."""

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            config=dict(run.settings),
            dir=str(run.folder),
        )

    def log(self, step: int, values: Values) -> None:
        # W&B's own step must increase, but an evaluation has the same step as a training step.
        self._run.log({**values, "step": step})

    def log_answers(self, step: int, table: AnswerTable) -> None:
        rows = [list(row) for row in table.rows]
        self._run.log({table.tag: self._table(columns=list(table.columns), data=rows), "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
        self._metric = mlflow.entities.Metric
        params = [
            mlflow.entities.Param(_plain(key), str(value)[:500]) for key, value in flat(run.settings).items()
        ]
        for start in range(0, len(params), 100):  # the maximum of one request
            self._client.log_batch(self._id, params=params[start : start + 100])
        self._tables: deque[dict[str, str]] = deque(maxlen=40)  # a tag can hold this number of tables

    def log(self, step: int, values: Values) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_plain(name), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def log_answers(self, step: int, table: AnswerTable) -> None:
        # As MlflowClient.log_table writes it, which needs pandas.
        path = f"{table.tag}-{step:06d}.json"
        self._client.log_dict(self._id, {"columns": table.columns, "data": table.rows}, path)
        self._tables.append({"path": path, "type": "table"})
        self._client.set_tag(self._id, "mlflow.loggedArtifacts", json.dumps(list(self._tables)))

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _SwanLab:
    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        self._table = swanlab.echarts.Table
        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            experiment_name=run.name,
            config=dict(run.settings),
            logdir=str(run.folder / "swanlab"),
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def log_answers(self, step: int, table: AnswerTable) -> None:
        made = self._table()
        made.add(list(table.columns), [list(row) for row in table.rows])
        self._run.log({table.tag: made}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._table = trackio.Table
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=run.name, config=dict(run.settings)
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def log_answers(self, step: int, table: AnswerTable) -> None:
        rows = [list(row) for row in table.rows]
        self._run.log({table.tag: self._table(columns=list(table.columns), data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _plain(name: str) -> str:
    """The name as MLflow allows it: without the brackets of a setting in a list, and without the @ of avg@8."""
    return re.sub(r"[^/\w.\- ]", "_", name.replace("[", ".").replace("]", ""))


_OPEN: dict[str, Callable[[TrackedRun], Tracker]] = {
    TENSORBOARD: _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
    "swanlab": _SwanLab,
    "trackio": _Trackio,
}
