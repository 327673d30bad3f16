"""Time of a step's sampling and grading: grading at the end against grading as answers arrive, with slow graders.

    python benchmarks/grading_overlap.py [--prompts 48 --rollouts 8 --seconds 8 --repeats 3] [--output FILE]

An HTTP server sends recorded answers of 200 tokens. The answers to a prompt arrive after a log-normal time; the longest
takes ``--seconds``. The real client reads them, and real grader processes grade them. Each kind of grader sleeps, so
that two cores suffice:

* a function that takes 50 ms, in 4 processes, such as one that runs tests of code;
* an ``async`` function that takes 1 s, in 2 processes with 32 calls at a time, such as an LLM judge;
* a function of lists of 16 that takes 200 ms a list. It gets its lists when sampling has ended, in both cases.

Both ways of grading run in turn with the same answers, ``--repeats`` times. The table shows medians. It ends with 1 if
the two ways give different rewards.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from shared import circumstances

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_chord.records import Prompt, RolloutRequest
from megatron_chord.rewards.graders import Graders
from megatron_chord.rewards.kinds.function import FunctionReward
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.sampling.rounds import Grading, Sampling, sample
from tests.support.recorded import END, VERSION, numbers_template, recorded_server

MODULE = """
import asyncio
import time

def runs_tests(response):
    time.sleep(0.05)
    return float(len(response.text) % 7)

async def judge(response):
    await asyncio.sleep(1.0)
    return float(len(response.text) % 7)

def scores_lists(responses):
    time.sleep(0.2)
    return [float(len(response.text) % 7) for response in responses]
"""
GRADERS: dict[str, dict[str, Any]] = {
    "50 ms, 4 processes": {"name": "runs_tests", "workers": 4},
    "async, 1 s, 2 x 32 calls": {"name": "judge", "workers": 2, "concurrency": 32},
    "lists of 16, 200 ms, 4 processes": {"name": "scores_lists", "workers": 4, "batch_size": 16},
}
TOKENS = 200
Seconds = tuple[float, float]
"""Seconds of sampling, and seconds of the wait for grades after it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="arrival of the last answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    table = Table(title=f"seconds of a step with {arguments.prompts} x {arguments.rollouts} answers, medians")
    table.add_column("grader")
    for heading in ("", "sampling", "wait for grades", "both"):
        table.add_column(heading, justify="right" if heading else "left")
    are_equal = True
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "slow.py"
        path.write_text(MODULE)
        for title, settings in GRADERS.items():
            with Graders(FunctionReward(path=path, timeout_s=60, **settings)) as graders:
                found, rewards = measured(graders, arguments)
            are_equal = are_equal and len(rewards) == 1
            for way, seconds in found.items():
                sampling, waiting, both = (
                    statistics.median(values) for values in (*zip(*seconds, strict=True), map(sum, seconds))
                )
                table.add_row(title, way, f"{sampling:.2f}", f"{waiting:.2f}", f"{both:.2f}")
    lines = [
        f"rewards of both ways: {'equal' if are_equal else 'DIFFERENT'}",
        circumstances(),
    ]
    for output in (sys.stdout, *([arguments.output.open("w")] if arguments.output else [])):
        console = Console(file=output, width=120)
        console.print(table)
        for line in lines:
            console.print(line, highlight=False)
    return 0 if are_equal else 1


def measured(
    graders: Graders, arguments: argparse.Namespace
) -> tuple[dict[str, list[Seconds]], set[tuple[float | None, ...]]]:
    """The seconds of each repeat of both ways, and the different rewards that were found (one if all are equal)."""
    rng = np.random.default_rng(0)
    arrivals = rng.lognormal(0.0, 0.6, arguments.prompts)
    arrivals *= arguments.seconds / arrivals.max()
    answers = rng.integers(10, 9999, (arguments.prompts, arguments.rollouts, TOKENS))
    answers[:, :, -1] = END

    def reply(number: int, aborted: threading.Event) -> Sequence[Sequence[int]]:
        time.sleep(arrivals[number])
        return answers[number].tolist()

    found: dict[str, list[Seconds]] = {"at the end": [], "as they arrive": []}
    rewards: set[tuple[float | None, ...]] = set()
    with recorded_server(reply) as client:
        for _ in range(arguments.repeats):
            for way, seconds in found.items():
                own, values = step(client, graders, arguments, adds=way == "as they arrive")
                seconds.append(own)
                rewards.add(values)
    return found, rewards


def step(
    client: RolloutClient, graders: Graders, arguments: argparse.Namespace, *, adds: bool
) -> tuple[Seconds, tuple[float | None, ...]]:
    requests = [
        RolloutRequest(prompt=Prompt(id=str(i), messages=(), truth="", token_ids=(i,)), seed=i)
        for i in range(arguments.prompts)
    ]
    sampling = Sampling(
        num_rollouts=arguments.rollouts, temperature=1.0, max_tokens=TOKENS, stop_token_ids=(END,)
    )
    with Grading(requests, template=numbers_template(), graders=graders, max_error_rate=0) as grading:
        start = time.perf_counter()
        sampled = sample(
            [client],
            requests,
            sampling,
            version=VERSION,
            deadline_s=600,
            on_group=(lambda index, rollouts, _: grading.add(index, rollouts)) if adds else None,
        )
        middle = time.perf_counter()
        graded = grading.finish(range(len(requests)), sampled)
        end = time.perf_counter()
    return (middle - start, end - middle), tuple(reward for item in graded for reward in item.rewards)


if __name__ == "__main__":
    sys.exit(main())
