"""Folders of runs for the tests: the recorded quick start, and made-up runs of any length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.files import rows_of, write_rows

QUICKSTART = Path(__file__).with_name("quickstart.jsonl")
"""metrics.jsonl of `make quickstart` on two cores, rounded to four digits."""
SETTINGS = """
steps: 60
method: {name: chord, mu: {schedule: constant, peak: 0.5}}
optim: {lr: 0.0005}
parallel: {ranks: 1}
data: {max_response_tokens: 48}
rollout: {temperature: 1.0, servers: [], tensor: 1, asynchronous: null}
evaluation: {samples: 1}
"""


def rows_of_quickstart() -> list[dict[str, Any]]:
    return rows_of(QUICKSTART)


def made_up_rows(steps: int) -> list[dict[str, Any]]:
    """Rows with the quick start's numbers, repeated with small changes, so that their digits take space."""
    rows = [row for row in rows_of_quickstart() if "evaluation" not in row]
    return [
        _changed(rows[step % len(rows)], 1 + 0.1 * math.sin(step)) | {"step": step} for step in range(steps)
    ]


def _changed(row: dict[str, Any], factor: float) -> dict[str, Any]:
    return {
        name: _changed(value, factor)
        if isinstance(value, dict)
        else value * factor
        if isinstance(value, float)
        else value
        for name, value in row.items()
    }


def answer(prompt: str, text: str, reward: float | None, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "prompt": f"question {prompt}",
        "truth": "7",
        "response": text,
        "score": reward,
        "reward": reward,
        "grader_error": None if reward is not None else "timed out",
        "num_tokens": len(text.split()),
        "finish_reason": "stop",
        "mean_logprob": -0.5,
        **more,
    }


def make_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    samples: dict[str, Sequence[dict[str, Any]]] | None = None,
    settings: str = SETTINGS,
) -> Path:
    """Write a run's folder. ``samples`` has the answers by the name of their file, such as ``step-000000``."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    write_rows(folder / "metrics.jsonl", *rows)
    for name, answers in (samples or {}).items():
        write_rows(folder / "samples" / f"{name}.jsonl", *answers)
    return folder
