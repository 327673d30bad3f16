"""The commands `evaluate` and `compare`: their output and their exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_chord.config_io import load_suite
from megatron_chord.evaluation.compare import compare
from megatron_chord.evaluation.evaluate import evaluate
from megatron_chord.evaluation.policy import default_output
from megatron_chord.evaluation.results import TABLE
from megatron_chord.rollout.auth import KEY_VARIABLE
from megatron_chord.rollout.registry import JobNodes
from megatron_chord.rollout.replies import RolloutError
from megatron_chord.rollout.server import ServerError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "suites"
_INTERRUPTED, _REFUSED = 130, 2
_SHOWN = 10
"""Number of flipped problems that are shown."""
_WIDTH = 140


def evaluate_command(args: argparse.Namespace) -> int:
    """Run `evaluate`. Returns 0 if all answers exist, 1 if some are missing or the servers failed, 2 if refused."""
    # Leave through the finally blocks, which stop the servers.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    path = suite_path(args.suite)
    name = path.stem
    output = args.output or default_output(args.policy, name)
    key = os.environ.get(KEY_VARIABLE, "")
    if args.server and not key:
        print(f"error: --server: set {KEY_VARIABLE} to the key that the servers ask for", file=sys.stderr)
        return _REFUSED
    try:
        results = evaluate(
            args.policy,
            load_suite(path, args.overrides),
            suite_name=name,
            output=output,
            servers=args.server,
            server_key=key,
            job=JobNodes.of_environment(os.environ),
            say=lambda text: print(text, flush=True),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED
    except (RolloutError, ServerError) as error:
        print(f"error: {error}\n{_go_on(output)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped. {_go_on(output)}", file=sys.stderr)
        return _INTERRUPTED
    _print(_table(results))
    print(f"results in {output / TABLE}, answers in {output / 'samples'}")
    missing = sum(item["missing"] for item in results["benchmarks"].values())
    if missing:
        print(
            f"{missing} answers are missing, because their requests took longer than server.request_s. "
            f"{_go_on(output)}"
        )
    return 1 if missing else 0


def compare_command(args: argparse.Namespace) -> int:
    """Run `compare`. Returns 0, or 2 if the two evaluations cannot be compared."""
    try:
        found, remarks = compare(args.a, args.b)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED
    table = Table(
        title=f"A: {args.a}\nB: {args.b}",
        caption="B - A in percentage points, with the 95 % interval",
    )
    for column in ("benchmark", "metric", "A", "B", "B - A", "interval", "problems", "gained", "lost"):
        is_name = column in ("benchmark", "metric")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for item in found:
        table.add_row(
            item.benchmark,
            item.metric,
            f"{100 * item.a:.1f} %",
            f"{100 * item.b:.1f} %",
            f"{100 * item.difference.value:+.1f}",
            f"{100 * item.difference.low:+.1f} to {100 * item.difference.high:+.1f}",
            str(item.num_problems),
            str(len(item.gained)),
            str(len(item.lost)),
        )
    _print(table)
    for item in found:
        for what, problems in (("gained", item.gained), ("lost", item.lost)):
            if problems:
                shown = problems if args.all else problems[:_SHOWN]
                more = (
                    f", and {len(problems) - len(shown)} more (--all)" if len(problems) > len(shown) else ""
                )
                print(f"{item.benchmark} {item.metric}: {len(problems)} {what}: {', '.join(shown)}{more}")
    for remark in remarks:
        print(remark)
    return 0


def suite_path(suite: str) -> Path:
    """The file of a suite. A name such as ``paper`` means a file in examples/suites."""
    example = EXAMPLES / f"{suite}.yaml"
    return example if "/" not in suite and not Path(suite).suffix and example.is_file() else Path(suite)


def _go_on(output: Path) -> str:
    return f"The answers so far are in {output}. The same command continues from there"


def _table(results: dict) -> Table:
    table = Table(title=f"{results['policy']['name']} on {results['suite']}")
    for column in ("benchmark", "metric", "value", "95 % interval", "problems", "tokens", "truncated"):
        is_name = column in ("benchmark", "metric")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for name, item in results["benchmarks"].items():
        tokens = "" if item["response_tokens"] is None else f"{item['response_tokens']['mean']:.0f}"
        for metric, found in item["metrics"].items():
            table.add_row(name, metric, *_numbers(found), tokens, f"{100 * item['truncated']:.1f} %")
    for name, found in results["means"].items():
        table.add_row(f"[bold]{name}", found["metric"], *_numbers(found), "", "")
    errors = sum(item["grader_errors"] for item in results["benchmarks"].values())
    if errors:
        table.caption = f"{errors} answers could not be graded and are left out: see `error` in samples/"
    return table


def _print(table: Table) -> None:
    """Print a table. If the output is not a terminal, the lines are as wide as the table needs."""
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def _numbers(found: dict) -> tuple[str, str, str]:
    if found["value"] is None:
        return "-", "-", str(found["problems"])
    interval = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
    return f"{100 * found['value']:.1f} %", interval, str(found["problems"])
