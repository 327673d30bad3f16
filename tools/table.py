#!/usr/bin/env python
"""Reproduce the table of the CHORD paper: show the state of each row, run the missing rows, print both numbers.

    python tools/table.py                            # prints the state of each row and the table; starts nothing
    python tools/table.py --run math:model.path=PATH math:data.prompts=PATH math:data.demonstrations=PATH ...
    python tools/table.py --sbatch @site.txt         # the same in Slurm jobs; the settings are lines of a file
    python tools/table.py --run @examples/published/quick_start.txt      # all rows with the quick start's policy

A row is a preset in examples/published/. Its run is in runs/ROW, and its evaluation in evaluations/SUITE/ROW-policy. To
evaluate a row by hand, give `megatron-chord evaluate` this folder as --output. An interrupted run continues from its
newest checkpoint, an interrupted evaluation from the answers that it has. So the same command continues the table.

The exit code is 0 after success, 1 if a row failed, and 2 if settings cannot be used. docs/reproduce.md says more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_chord.config_io import dump_config, load_config, load_suite
from megatron_chord.config_suite import SuiteConfig
from megatron_chord.evaluation.command import suite_path
from megatron_chord.evaluation.evaluate import SUITE
from megatron_chord.evaluation.results import RESULTS
from megatron_chord.report.folder import read_runs
from megatron_chord.train.folder import POLICY

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "examples" / "published"
DOMAINS = {"math": "math_qwen7b", "tools": "tools_llama3b"}
BASE = "base"
TITLES = {
    BASE: "Original model",
    "sft_light": "SFT-light",
    "sft_best": "SFT-best",
    "grpo": "GRPO",
    "sft_light_rl": "SFT-light + RL",
    "sft_best_rl": "SFT-best + RL",
    "luffy": "LUFFY",
    "sasr": "SASR",
    "chord_mu": "CHORD-mu",
    "chord_phi": "CHORD-phi",
}
"""The rows, in the order of the table. A row comes after the row that it starts from."""
STARTS_FROM = {"sft_light_rl": "sft_light", "sft_best_rl": "sft_best"}
NOT_FOR = {
    "sft_light": ("batch.prompts", "batch.rollouts"),
    "sft_best": ("batch.prompts", "batch.rollouts"),
    "grpo": ("data.demonstrations", "batch.demonstrations"),
    "sft_light_rl": ("data.demonstrations", "batch.demonstrations", "model.path"),
    "sft_best_rl": ("data.demonstrations", "batch.demonstrations", "model.path"),
    "luffy": ("batch.demonstrations",),
}
"""Settings of all rows, or of all rows of a domain, that these rows do not take.

SFT samples nothing. GRPO has no demonstrations. LUFFY has one demonstration for each prompt. Rows of SFT + RL start
from another row's policy.
"""
PAPER_COLUMNS = ("amc avg@8", "aime24 avg@32", "aime25 avg@32", "mmlu_pro avg@1", "bfcl avg@1")
PAPER = {
    BASE: ("43.8", "11.7", "6.66", "24.7", "46.2"),
    "sft_best": ("55.9", "15.8", "15.2", "38.4", "69.8"),
    "grpo": ("52.1", "13.2", "8.54", "45.8", "77.1"),
    "sft_best_rl": ("58.4", "17.1", "16.3", "51.3", "76.1"),
    "luffy": ("52.8", "16.6", "14.3", "44.0", "76.1"),
    "sasr": ("54.0", "12.7", "11.1", "45.1", "74.7"),
    "chord_mu": ("60.8", "18.1", "17.9", "43.3", "77.6"),
    "chord_phi": ("62.5", "18.2", "17.2", "56.2", "78.5"),
}
"""The paper's numbers in percent, by column (arXiv 2508.11408, Table 1). docs/reproduce.md says how far they are
verified."""
DONE = "done"


class TableError(ValueError):
    """A request of the user that cannot be fulfilled."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One ``WHO:NAME=VALUE`` of the command line."""

    who: str
    """A row, a domain, or both (chord_phi_math). Empty: all rows."""
    text: str
    """The setting as NAME=VALUE."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table for one domain."""

    key: str
    domain: str
    settings: tuple[str, ...]
    """Settings of the training, as NAME=VALUE."""
    steps: int
    """Number of steps of the training."""
    run: Path
    """The folder of the training run."""
    policy: Path
    """The folder of the policy that is evaluated."""
    evaluation: Path
    suite: SuiteConfig
    suite_settings: tuple[str, ...]
    starts_from: Row | None = None

    @property
    def name(self) -> str:
        return f"{self.key}_{DOMAINS[self.domain]}"

    @property
    def preset(self) -> Path:
        return PRESETS / f"{self.name}.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        rows = rows_of(args)
        failed: list[str] = []
        if args.sbatch:
            failed = submit(rows, args.suite)
        elif args.run:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # see _call
            failed = run(rows, args.suite)
    except (ValueError, OSError) as error:  # refused settings raise a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. The same command continues from here", file=sys.stderr)
        return 130
    table = table_of(rows)
    print("\n".join(["", *states_of(rows), "", table]))
    if args.output is not None:
        args.output.write_text(table + "\n", encoding="utf-8")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


# The rows


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Return the requested rows. The two domains of a line follow each other.

    Raises:
        ValueError: a setting names no row of the table, or a preset or the suite cannot be read with the settings.
    """
    settings = [read_setting(text) for text in args.settings]
    suites = {domain: _suite_for(domain, settings, args.suite) for domain in DOMAINS}
    rows: dict[tuple[str, str], Row] = {}
    for key in TITLES:
        for domain in DOMAINS:
            start = rows.get((STARTS_FROM.get(key, ""), domain))
            rows[key, domain] = _row(key, domain, settings, start, suites[domain], args)
    wanted = {name.replace("-", "_") for name in args.row}
    unknown = sorted(wanted - {name for row in rows.values() for name in names_of(row.key, row.domain)})
    if unknown:
        raise TableError(f"--row {', '.join(unknown)}: {_names()}")
    return [row for row in rows.values() if not wanted or wanted & names_of(row.key, row.domain)]


def _row(
    key: str,
    domain: str,
    settings: Sequence[Setting],
    start: Row | None,
    suite: tuple[SuiteConfig, tuple[str, ...]],
    args: argparse.Namespace,
) -> Row:
    chosen = settings_for(key, domain, settings)
    folder = args.runs / f"{key}_{DOMAINS[domain]}"
    if start is not None:
        chosen = [f"model.path={start.policy.resolve()}", *chosen]
    # The other rows start from the model in GRPO's preset.
    preset = "grpo" if key == BASE else key
    config = load_config(PRESETS / f"{preset}_{DOMAINS[domain]}.yaml", [*chosen, f"output={folder}"])
    policy = config.model.path if key == BASE else folder / POLICY
    return Row(
        key=key,
        domain=domain,
        settings=tuple(chosen),
        steps=config.steps,
        run=folder,
        policy=policy,
        evaluation=args.evaluations / suite_path(args.suite).stem / f"{folder.name}-{POLICY}",
        suite=suite[0],
        suite_settings=suite[1],
        starts_from=start,
    )


def _suite_for(domain: str, settings: Sequence[Setting], suite: str) -> tuple[SuiteConfig, tuple[str, ...]]:
    """Return the suite of a domain, and the settings that make it from the suite's file."""
    path, chosen = suite_path(suite).resolve(), [item.text for item in settings if item.who == "suite"]
    whole = load_suite(path, chosen)
    only = benchmarks_of(whole, domain)
    if not only:
        return whole, tuple(chosen)
    chosen.append(f"only=[{', '.join(only)}]")
    return load_suite(path, chosen), tuple(chosen)


def names_of(key: str, domain: str) -> set[str]:
    """Return all names that a row of the table has in settings and in --row."""
    return {key, domain, f"{key}_{domain}", f"{key}_{DOMAINS[domain]}"}


def read_setting(text: str) -> Setting:
    """Read ``WHO:NAME=VALUE`` or ``NAME=VALUE``.

    Raises:
        TableError: it is neither, or there is no row WHO.
    """
    found = re.fullmatch(r"(?:([a-z0-9_-]+):)?([a-z][\w.]*=.*)", text, re.DOTALL)
    if found is None:
        raise TableError(f"{text!r} is not a setting: expected NAME=VALUE or WHO:NAME=VALUE")
    who = (found[1] or "").replace("-", "_")
    known = {"", "suite"} | {name for key in TITLES for domain in DOMAINS for name in names_of(key, domain)}
    if who not in known:
        raise TableError(f"{text!r} names no row of the table: {_names()}")
    return Setting(who=who, text=found[2])


def _names() -> str:
    return f"there are {', '.join(DOMAINS)}, {', '.join(TITLES)}, and both together, such as chord_phi_math"


def settings_for(key: str, domain: str, settings: Sequence[Setting]) -> list[str]:
    """Return a row's settings. More general settings come first, so that a later one replaces an earlier one."""

    def closeness(item: Setting) -> int:
        return ("", domain, key).index(item.who) if item.who in ("", domain, key) else 3

    def is_for_it(item: Setting) -> bool:
        is_general = item.who in ("", domain)
        if is_general and item.text.partition("=")[0] in NOT_FOR.get(key, ()):
            return False
        return is_general or item.who in names_of(key, domain)

    return [item.text for item in sorted(filter(is_for_it, settings), key=closeness)]


def benchmarks_of(suite: SuiteConfig, domain: str) -> list[str]:
    """Return the benchmarks of a domain: those with the reward ``tool_calls``, or the others.

    The list is empty, which means all, if the suite has only one of the two kinds, or names its benchmarks itself
    (``only``).
    """
    calls = [item.name for item in suite.resolved() if getattr(item.reward, "kind", "") == "tool_calls"]
    others = [item.name for item in suite.resolved() if item.name not in calls]
    if suite.only or not calls or not others:
        return []
    return calls if domain == "tools" else others


# What is there


def training_state(row: Row) -> str:
    """Return ``done``, or how far the run is."""
    if row.key == BASE:
        return DONE if (row.policy / "config.json").is_file() else f"no model in {row.policy}"
    try:
        (record,) = read_runs([row.run])
    except ValueError:
        return "missing"
    has_policy = (row.policy / "config.json").is_file() and record.settings.get("steps") == row.steps
    return DONE if has_policy else f"step {len(record.steps)} of {row.steps}"


def evaluation_state(row: Row) -> str:
    """Return ``done``, or the reason why the evaluation cannot be used as it is."""
    results = _results(row)
    if results is None:
        return "missing"
    suite, weights = row.evaluation / SUITE, row.policy.glob("*.safetensors")
    if not suite.is_file() or _settings_of(suite.read_text("utf-8")) != _settings_of(dump_config(row.suite)):
        return "of another suite"
    since = (row.evaluation / RESULTS).stat().st_mtime
    if suite.stat().st_mtime > since:  # the suite is written first, the results last
        return "not finished"
    if any(path.stat().st_mtime > since for path in weights):
        return "of an older policy"
    missing = sum(item["missing"] for item in results["benchmarks"].values())
    return f"{missing} answers missing" if missing else DONE


def _results(row: Row) -> Mapping | None:
    path = row.evaluation / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _settings_of(suite: str) -> Mapping:
    """Return the settings that can change answers: all of them, but of the servers only ``dtype``."""
    settings = yaml.safe_load(suite)
    return settings | {"server": settings["server"]["dtype"]}


def states_of(rows: Sequence[Row]) -> list[str]:
    """Return one line for each row."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{'row':{width}}  {'training':18}  evaluation"]
    return lines + [f"{row.name:{width}}  {training_state(row):18}  {evaluation_state(row)}" for row in rows]


# The table


def columns_of(suite: SuiteConfig) -> list[str]:
    """Return the first metric of each benchmark, as ``NAME METRIC``. A mean replaces the benchmarks that it is over."""
    means = suite.requested_means()
    covered = {name for mean in means for name in mean.of}
    single = [f"{item.name} {item.metrics[0]}" for item in suite.resolved() if item.name not in covered]
    return single + [f"{mean.name} {suite.metric_here(mean.metric)}" for mean in means]


def table_of(rows: Sequence[Row]) -> str:
    """Return Markdown with one line for each method. The columns of mathematics come before those of tool calls."""
    columns = {
        (row.domain, column): None for domain in DOMAINS for row in rows if row.domain == domain
        for column in columns_of(row.suite)
    }  # fmt: skip
    lines = [
        f"| row | {' | '.join(f'{domain}: {column}' for domain, column in columns)} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    ours = {(row.key, row.domain): _numbers(row) for row in rows}
    for key in dict.fromkeys(row.key for row in rows):
        cells = [_cell(ours.get((key, domain), {}).get(column), key, column) for domain, column in columns]
        lines.append(f"| {TITLES[key]} | {' | '.join(cells)} |")
    lines += ["", "Numbers are in percent. `-`: not measured here."]
    if any(column in PAPER_COLUMNS for _, column in columns):
        lines[-1] += " In brackets: the paper's number (arXiv 2508.11408, Table 1); `(-)`: not known here."
    return "\n".join(lines)


def _numbers(row: Row) -> Mapping[str, float | None]:
    """Return the numbers in [0, 1], by column. There are none until the run and the evaluation are done."""
    if training_state(row) != DONE or evaluation_state(row) != DONE:
        return {}
    results = _results(row)
    return results["row"] if results is not None else {}


def _cell(value: float | None, key: str, column: str) -> str:
    ours = "-" if value is None else f"{100 * value:.1f}"
    if column not in PAPER_COLUMNS:
        return ours
    theirs = PAPER[key][PAPER_COLUMNS.index(column)] if key in PAPER else "-"
    return f"{ours} ({theirs})"


# Running


def train_command(row: Row) -> list[str]:
    """Return the arguments of `megatron-chord train`, without the command itself."""
    return [str(row.preset), *row.settings, f"output={row.run.resolve()}"]


def evaluate_command(row: Row, suite: str) -> list[str]:
    """Return the arguments of `megatron-chord evaluate`."""
    path = str(suite_path(suite).resolve())
    return [
        str(row.policy.resolve()),
        "--suite",
        path,
        "--output",
        str(row.evaluation.resolve()),
        *row.suite_settings,
    ]


def run(rows: Sequence[Row], suite: str) -> list[str]:
    """Train and evaluate what is missing, one after the other, on this machine.

    Returns:
        A message for each failure. Rows that do not start from a failed row still run.
    """
    failed: list[str] = []
    for number, row in enumerate(rows, start=1):
        at = f"{number} of {len(rows)}"
        try:
            if training_state(row) != DONE:
                if row.key == BASE:
                    raise _Failed(training_state(row))
                if row.starts_from is not None and training_state(row.starts_from) != DONE:
                    raise _Failed(f"it starts from {row.starts_from.name}, which is not done")
                _call(f"train {row.name} ({at})", "train", *train_command(row), "--resume", "auto")
            if evaluation_state(row) != DONE:
                _call(f"evaluate {row.name} ({at})", "evaluate", *evaluate_command(row, suite))
        except _Failed as error:
            failed.append(f"{row.name}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
    return failed


class _Failed(Exception):
    """A row that cannot be completed now."""


def _call(title: str, *arguments: str) -> None:
    """Run megatron-chord and wait until it has ended, also if this process is asked to end.

    Ctrl-C in the terminal reaches both processes. SIGTERM reaches only this one, which passes it on.
    """
    print(f"\n=== {title}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "megatron_chord.cli", *arguments], env=_environment())
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    if code != 0:
        raise _Failed(f"megatron-chord {arguments[0]} ended with {code}")


def _environment() -> dict[str, str]:
    """The environment in which megatron-chord is this package, from whatever folder it starts."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


# Slurm


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job for sbatch."""

    name: str
    """Equal work has an equal name, so that a job that waits or runs is not submitted again."""
    script: str
    arguments: tuple[str, ...]
    after: Job | None = None
    """The job that must first end successfully."""
    variables: Mapping[str, str] = field(default_factory=dict[str, str])


def jobs_of(rows: Sequence[Row], suite: str) -> Iterator[Job]:
    """Yield the jobs for what is missing, each after the job that it waits for. A missing original model has no job.

    Raises:
        TableError: a row starts from another one that is neither done nor among ``rows``.
    """
    training: dict[str, Job] = {}
    for row in rows:
        if row.key != BASE and training_state(row) != DONE:
            start = row.starts_from
            if start is not None and start.name not in training and training_state(start) != DONE:
                raise TableError(f"{row.name} starts from {start.name}, which is neither done nor requested")
            training[row.name] = Job(
                name=_job_name("train", row, row.run),
                script="chord_qwen7b.sh",
                arguments=tuple(train_command(row)[1:]),
                after=training.get(start.name) if start is not None else None,
                variables={"CHORD_RUN": str(row.preset)},
            )
            yield training[row.name]
        has_policy = row.name in training or training_state(row) == DONE
        if has_policy and (row.name in training or evaluation_state(row) != DONE):
            yield Job(
                name=_job_name("evaluate", row, row.evaluation),
                script="evaluate.sh",
                arguments=tuple(evaluate_command(row, suite)),
                after=training.get(row.name),
            )


def submit(rows: Sequence[Row], suite: str) -> list[str]:
    """Submit the jobs that are not in the queue yet, and print them.

    Returns:
        What sbatch refused, and the original models that are missing.
    """
    jobs = list(jobs_of(rows, suite))  # compute all jobs before the first is submitted
    ids = queued(_read("squeue", "--me", "--noheader", "--format=%i %j"))
    failed = [
        f"{row.name}: {training_state(row)}"
        for row in rows
        if row.key == BASE and training_state(row) != DONE
    ]
    for job in jobs:
        if job.name in ids:
            print(f"{job.name}: job {ids[job.name]} is in the queue already")
            continue
        if job.after is not None and job.after.name not in ids:
            failed.append(f"{job.name}: not submitted, because {job.after.name} was not submitted")
            continue
        after = [] if job.after is None else [f"--dependency=afterok:{ids[job.after.name]}"]
        command = ["--parsable", f"--job-name={job.name}", "--kill-on-invalid-dep=yes", *after]
        try:
            said = _read(
                "sbatch", *command, str(ROOT / "slurm" / job.script), *job.arguments, **job.variables
            )
        except TableError as error:
            failed.append(f"{job.name}: {error}")
            continue
        ids[job.name] = said.strip().partition(";")[0]
        print(f"{job.name}: job {ids[job.name]}{', after ' + job.after.name if job.after else ''}")
    return failed


def queued(text: str) -> dict[str, str]:
    """Return the job ids by name, from the lines of squeue."""
    pairs = [line.split(maxsplit=1) for line in text.splitlines()]
    return {pair[1].strip(): pair[0] for pair in pairs if len(pair) == 2}


def _job_name(what: str, row: Row, folder: Path) -> str:
    mark = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=3).hexdigest()
    return f"{what}-{row.name}-{mark}"


def _read(program: str, *arguments: str, **variables: str) -> str:
    environment = {"CHORD_HOME": str(ROOT)} | os.environ | variables
    try:
        done = subprocess.run(
            [program, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise TableError(f"--sbatch: there is no {program} on this machine") from None
    if done.returncode != 0:
        raise TableError(f"{program} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


# The command line


class _Parser(argparse.ArgumentParser):
    """Each line of an @FILE is one argument. Empty lines and comments are skipped."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        line = arg_line.strip()
        return [] if not line or line.startswith("#") else [line]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="[WHO:]NAME=VALUE",
        help="a setting of the runs; WHO is a row (grpo), a domain (math, tools) or both (grpo_math), and `suite` for "
        "a setting of the suite. @FILE: a file with one of these in a line",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", help="train and evaluate what is missing, on this machine")
    how.add_argument("--sbatch", action="store_true", help="submit it to Slurm, one job for each step")
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="WHO",
        help="only these rows (may be repeated; default: all)",
    )
    parser.add_argument(
        "--suite", default="paper", metavar="SUITE.yaml", help="suite of benchmarks (default: paper)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="folder of the runs (default: runs)"
    )
    parser.add_argument(
        "--evaluations",
        type=Path,
        default=Path("evaluations"),
        metavar="FOLDER",
        help="folder of the evaluations (default: evaluations)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the table there")
    # Settings may stand on both sides of an option.
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
