"""A stop request interrupts an evaluation, and the resumed run makes it. Real ranks, with a scripted rollout server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_chord.records import Rollout
from megatron_chord.rollout.replies import GenerateRequest, RolloutError
from tests.support.ranks import run_ranks
from tests.support.task import make_task, metrics_of

ACCURACY = {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.25}
"""By the number of steps. The best evaluation is neither the first nor the last one."""
SECONDS = 60.0
"""A stop may take this long, with the checkpoint. Without an interruption the evaluation takes ``HANGS_S``."""
HANGS_S = 120.0


class ScriptedClient:
    """Answers the first problems of an evaluation correctly. It may instead hang, from the moment of a stop request."""

    def __init__(self, policy: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(policy)
        self._cancelled = threading.Event()
        self.stop: Path | None = None
        """The stop file of an evaluation that hangs."""

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        version: int,
        on_answer: Callable[[int, tuple[Rollout, ...]], None],
        **_: Any,
    ) -> list[tuple[Rollout, ...]]:
        if self.stop is not None:
            self.stop.touch()
            self._cancelled.wait(HANGS_S)
            raise RolloutError("cancelled")
        answers = []
        for index, request in enumerate(requests):
            first = int(self._tokenizer.decode(request.prompt_ids).split("user\n")[1].split(" ")[0])
            right = index < ACCURACY[version] * len(requests)
            text = f"#### {2 * first + 1}<|im_end|>" if right else "<|im_end|>"
            tokens = tuple(self._tokenizer.encode(text))
            rollout = Rollout(
                token_ids=tokens, logprobs=(-1.0,) * len(tokens), finish_reason="stop", weight_version=version
            )
            answers.append((rollout,))
            on_answer(index, answers[-1])
        return answers

    def cancel(self) -> None:
        self._cancelled.set()


class ScriptedEngine:
    """The part of ``RolloutEngine`` that a run needs whose method samples nothing."""

    generation = 0
    route_keys: dict[str, str] = {}  # noqa: RUF012
    has_offloaded = False

    def __init__(self, policy: Path, stop: Path, *, hangs_at: int | None) -> None:
        self._client, self._stop, self._hangs_at = ScriptedClient(policy), stop, hangs_at

    @property
    def clients(self) -> list[ScriptedClient]:
        return [self._client]

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        return action(*arguments)

    def push_weights(self, state: Any, version: int) -> None:
        self._client.stop = self._stop if version == self._hangs_at else None

    def release_routes(self, step: int) -> None: ...
    def end_sampling(self) -> None: ...
    def close(self) -> None: ...

    def take_sync_seconds(self) -> float:
        return 0.0


def train_until(file: Path, output: Path, stop: Path, hangs_at: int | None) -> tuple[int, float]:
    """Start or continue a run that is stopped in evaluation ``hangs_at``. Return its exit code, and the seconds from
    the stop request to the end."""
    from megatron_chord.config_io import load_config
    from megatron_chord.train import start
    from megatron_chord.train.loop import train
    from megatron_chord.train.stop import Stopped

    def engine(run: Any, groups: Any, **_: Any) -> Any:
        return ScriptedEngine(run.model.path, stop, hangs_at=hangs_at)

    start.RolloutEngine = engine  # type: ignore[misc, assignment]
    try:
        train(load_config(file, [f"output={output}"]), resume="auto", stop_wanted=stop.exists)
    except Stopped as stopped:
        return stopped.exit_code, time.time() - stop.stat().st_mtime
    return 0, 0.0


def numbers(folder: Path) -> list[dict[str, Any]]:
    but = ("seconds", "tokens_per_s", "tflops_per_gpu", "mfu")
    return [{name: value for name, value in row.items() if name not in but} for row in metrics_of(folder)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_interrupts_every_evaluation_and_none_is_lost(tmp_path: Path, ranks: int) -> None:
    """The stopped run is interrupted in the initial evaluation, in that of its best weights (twice) and in the last."""
    file = make_task(
        tmp_path,
        method={"mu": {"peak": 1}},
        evaluation={"every": 1},
        checkpoint={"keep": 1, "keep_best": "accuracy", "export": "best"},
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    turns = [(straight, None), *((stopped, at) for at in (0, 2, 2, 3, None))]
    ends = [
        run_ranks(train_until, ranks, file, output, tmp_path / f"stop-{number}", hangs_at)
        for number, (output, hangs_at) in enumerate(turns)
    ]
    for code, of_ranks in zip([0, 76, 75, 76, 75, 0], ends, strict=True):
        assert [found for found, _ in of_ranks] == [code] * ranks
        assert max(seconds for _, seconds in of_ranks) < SECONDS
    assert [row["evaluation"]["accuracy"] for row in numbers(straight) if "evaluation" in row] == [
        *ACCURACY.values()
    ]
    assert numbers(stopped) == numbers(straight)
    kept = {path.name for path in (straight / "checkpoints").glob("step-*")}
    assert (
        {path.name for path in (stopped / "checkpoints").glob("step-*")}
        == kept
        == {"step-000002", "step-000003"}
    )
    for name in (
        "policy/model.safetensors",
        "samples/evaluation-000002.jsonl",
        "samples/evaluation-000003.jsonl",
    ):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes()
