"""Kill runs 30 times at random moments and resume them, and compare them with the same runs undisturbed.

    python benchmarks/kills.py [--seed 1] [--rl 12 --rl-two-ranks 8 --sft-two-ranks 10]

SIGKILL goes to the trainer (or its launcher), to each of two ranks, and to the server: while the run starts, within a
step, within a save and after it. Everything runs on one core, with rollout.repeatable. At the end nothing may be left
in the process table, the temp folder, ``/dev/shm`` and the checkpoints' folder. Metrics and exported policy must equal
those of the undisturbed run bit for bit. The exit code is 0 if all of this holds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.kills import draw, run_through_kills  # noqa: E402
from tests.support.task import metrics_of  # noqa: E402

EXAMPLE = ROOT / "examples" / "arithmetic"
TIMES = ("seconds", "tokens_per_s", "tflops_per_gpu", "mfu")
CASES: dict[str, dict[str, Any]] = {
    "rl": {"victims": ("launcher", "server", "rank0"), "overrides": ("parallel.ranks=1",)},
    "rl_two_ranks": {"victims": ("rank1", "launcher", "rank0", "server"), "overrides": ("parallel.ranks=2",)},
    "sft_two_ranks": {
        "victims": ("rank0", "rank1", "launcher"),
        "overrides": ("parallel.ranks=2", "method.mu.peak=1.0"),
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rl", type=int, default=12, help="kills of a run of one rank with a server")
    parser.add_argument("--rl-two-ranks", type=int, default=8, help="kills of two ranks with a server")
    parser.add_argument("--sft-two-ranks", type=int, default=10, help="kills of two ranks without a server")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        held = [
            compare(Path(folder), name, getattr(args, name), args.seed + index)
            for index, name in enumerate(CASES)
            if getattr(args, name)
        ]
    print("PASS" if all(held) else "FAIL")
    return 0 if all(held) else 1


def compare(folder: Path, name: str, count: int, seed: int) -> bool:
    """Compare one kind of run. Return whether everything holds."""
    victims, overrides = CASES[name]["victims"], CASES[name]["overrides"]
    config = write_config(folder, steps=count + 4)
    print(f"{name}: undisturbed")
    begun = time.monotonic()
    straight, killed = folder / f"{name}-straight", folder / f"{name}-killed"
    run_through_kills(config, straight, [], *overrides, temp=folder / "tmp", say=say)
    print(f"{name}: {count} kills, seed {seed}; the undisturbed run took {time.monotonic() - begun:.0f} s")
    report = run_through_kills(
        config, killed, draw(seed, count, victims), *overrides, temp=folder / "tmp", say=say
    )
    same_metrics = without_times(straight) == without_times(killed)
    policy = "policy/model.safetensors"
    same_policy = (straight / policy).read_bytes() == (killed / policy).read_bytes()
    print(
        f"{name}: {len(report.kills)} kills in {report.lives} lives, {time.monotonic() - begun:.0f} s; "
        f"{report.early} found no victim; processes left: {report.survivors or 'none'}; files left: "
        f"{report.left or 'none'}; metrics {'equal' if same_metrics else 'DIFFER'}; policy "
        f"{'equal' if same_policy else 'DIFFERS'}",
        flush=True,
    )
    return same_metrics and same_policy and not report.survivors and not report.left


def write_config(folder: Path, *, steps: int) -> Path:
    settings = {
        "output": str(folder / "out"),
        "steps": steps,
        "seed": 3,
        "model": {"path": str(EXAMPLE / "policy"), "dtype": "fp32"},
        "data": {
            "prompts": str(EXAMPLE / "problems_train.jsonl"),
            "demonstrations": str(EXAMPLE / "demonstrations.jsonl"),
            "max_prompt_tokens": 64,
            "max_response_tokens": 64,
        },
        "batch": {"prompts": 2, "rollouts": 4, "demonstrations": 4, "max_tokens_per_gpu": 512},
        "method": {"mu": {"peak": 0.3}},
        "rollout": {"kv_cache_bytes": 64 * 2**20, "repeatable": True},
        "reward": {"kind": "exact", "workers": 1},
        "optim": {"lr": 3e-4, "warmup_steps": 2},
        "checkpoint": {"every": 1, "keep": 2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def without_times(output: Path) -> list[str]:
    rows = [{key: row[key] for key in row if key not in TIMES} for row in metrics_of(output)]
    return [json.dumps(row, sort_keys=True) for row in rows]


def say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
