"""How long a report takes and how large its page is, for runs of 1,000 and 10,000 steps with long answers.

    python benchmarks/report.py [--steps 1000 10000]

The numbers of the steps are random. They have as many names as in a run that uses everything. Each of the last steps
has 512 answers of 1,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_chord.report.curves import CHARTS
from megatron_chord.report.page import write_report

ANSWERS, TOKENS, FILES = 512, 1000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=[1000, 10_000])
    print(f"{'steps':>8}{'seconds':>10}{'MB':>8}")
    for steps in parser.parse_args().steps:
        with tempfile.TemporaryDirectory() as folder:
            run = _make_run(Path(folder) / "run", steps)
            start = time.perf_counter()
            page = write_report([run], Path(folder) / "report.html")
            seconds = time.perf_counter() - start
            print(f"{steps:>8}{seconds:>10.1f}{page.stat().st_size / 1e6:>8.2f}")


def _make_run(folder: Path, steps: int) -> Path:
    (folder / "samples").mkdir(parents=True)
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            file.write(json.dumps(_row(step, draw)) + "\n")
    for step in range(max(0, steps - FILES), steps):
        with (folder / "samples" / f"step-{step:06d}.jsonl").open("w") as file:
            for answer in range(ANSWERS):
                file.write(json.dumps(_answer(answer, draw)) + "\n")
    return folder


def _row(step: int, draw: random.Random) -> dict[str, Any]:
    names = [name for chart in CHARTS for name in chart.metrics] + [f"other_{i}" for i in range(20)]
    phases = ("collect", "train", "total", "sample", "grade", "pack", "sync")
    return {
        "step": step,
        **{name: draw.random() for name in names},
        "seconds": {phase: draw.random() for phase in phases},
    }


def _answer(number: int, draw: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_id": f"p{number // 8}",
        "prompt": "question",
        "truth": "7",
        "response": "word " * TOKENS,
        "reward": float(draw.random() > 0.5),
        "num_tokens": TOKENS,
        "finish_reason": "stop",
        "mean_logprob": -0.5,
    }
    if number < 4:
        row["tokens"] = [["word ", -draw.random()] for _ in range(TOKENS)]
    return row


if __name__ == "__main__":
    main()
