"""The results of an evaluation: numbers for each benchmark, each problem's grades, and tables of them."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_chord.config_suite import BenchmarkConfig, SuiteConfig
from megatron_chord.evaluation.answers import Answer
from megatron_chord.evaluation.metrics import Graded, bootstrap, by_category, read_metric, value_of
from megatron_chord.files import write_whole
from megatron_chord.records import Prompt

RESULTS, PROBLEMS, TABLE, ROW = "results.json", "problems.jsonl", "results.md", "row.md"


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """The grades and metrics of one problem: a line of ``problems.jsonl``."""

    benchmark: str
    problem: str
    category: str | None
    question: str
    """Hash of the messages and the truth: equal for every policy."""
    truth: str
    scores: tuple[float | None, ...]
    """The grade of each answer; None if its grading failed. Missing answers have no entry."""
    values: dict[str, float | None]
    """The value of each metric; None if too few answers could be graded."""


def problem_result(
    benchmark: BenchmarkConfig,
    prompt: Prompt,
    category: str | None,
    answers: Sequence[Answer],
    votes: Sequence[int | None],
) -> ProblemResult:
    """The result of one problem. ``votes`` are those of the answers that have a score, in order."""
    scores = [answer.score for answer in answers if answer.score is not None]
    graded = [Graded(score, vote) for score, vote in zip(scores, votes, strict=True)]
    asked = json.dumps([prompt.messages, prompt.truth], sort_keys=True)
    return ProblemResult(
        benchmark=benchmark.name,
        problem=prompt.id,
        category=category,
        question=hashlib.blake2b(asked.encode(), digest_size=16).hexdigest(),
        truth=prompt.truth,
        scores=tuple(answer.score for answer in answers),
        values={name: value_of(read_metric(name), graded) for name in benchmark.metrics},
    )


def benchmark_result(
    benchmark: BenchmarkConfig,
    problems: Sequence[ProblemResult],
    answers: Sequence[Answer],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The numbers of one benchmark. Shares and metrics are in [0, 1], lengths in tokens."""
    assert benchmark.sampling is not None
    lengths = [answer.tokens for answer in answers]
    metrics: dict[str, Any] = {}
    for name in benchmark.metrics:
        values = [value for item in problems if (value := item.values[name]) is not None]
        found = asdict(bootstrap([values], seed=seed, resamples=resamples)) if values else {"value": None}
        metrics[name] = found | {"problems": len(values)}
    result: dict[str, Any] = {
        "problems": len(problems),
        "answers": len(answers),
        "metrics": metrics,
        "response_tokens": {
            "mean": statistics.fmean(lengths),
            "median": statistics.median(lengths),
            "max": max(lengths),
        }
        if lengths
        else None,
        "truncated": sum(answer.finish_reason == "length" for answer in answers) / max(1, len(answers)),
        "grader_errors": sum(answer.score is None for answer in answers),
        "missing": len(problems) * benchmark.sampling.samples - len(answers),
    }
    if benchmark.category is not None:
        result["categories"] = {name: _categories(problems, name) for name in benchmark.metrics}
    return result


def _categories(problems: Sequence[ProblemResult], metric: str) -> dict[str, Any]:
    values = {item.problem: value for item in problems if (value := item.values[metric]) is not None}
    found = by_category(values, {item.problem: item.category or "" for item in problems})
    return {name: {"problems": count, "value": mean} for name, (count, mean) in found.items()}


def means(suite: SuiteConfig, problems: Sequence[ProblemResult]) -> dict[str, Any]:
    """The suite's means over benchmarks."""
    found: dict[str, Any] = {}
    for mean in suite.requested_means():
        metric = suite.metric_here(mean.metric)
        groups = [
            [
                value
                for item in problems
                if item.benchmark == name and (value := item.values[metric]) is not None
            ]
            for name in mean.of
        ]
        if all(groups):
            weigh = "problems" if mean.weigh == "problems" else "groups"
            interval = bootstrap(groups, seed=suite.seed, weigh=weigh, resamples=suite.resamples)
            found[mean.name] = {
                "metric": metric,
                **asdict(interval),
                "problems": sum(map(len, groups)),
            }
    return found


def row_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The policy's row in a comparison table: a number in [0, 1] for each metric and mean."""
    row: dict[str, float | None] = {}
    for name, benchmark in results["benchmarks"].items():
        row |= {f"{name} {metric}": found["value"] for metric, found in benchmark["metrics"].items()}
    return row | {f"{name} {found['metric']}": found["value"] for name, found in results["means"].items()}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    lines = [
        f"# {results['policy']['name']} on {results['suite']}",
        "",
        f"Policy `{results['policy']['path']}`, weights {results['policy']['digest']}, seed {results['seed']}. "
        "Intervals are 95 % bootstrap intervals over problems.",
        "",
        "| benchmark | metric | value | interval | problems | answers | tokens | truncated | grader errors | missing |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, item in results["benchmarks"].items():
        tokens = "" if item["response_tokens"] is None else f"{item['response_tokens']['mean']:.0f}"
        for metric, found in item["metrics"].items():
            lines.append(
                f"| {name} | {metric} | {_percent(found['value'])} | {_interval(found)} | {found['problems']} | "
                f"{item['answers']} | {tokens} | {_percent(item['truncated'])} | {item['grader_errors']} | "
                f"{item['missing']} |"
            )
    for name, found in results["means"].items():
        lines.append(
            f"| **{name}** | {found['metric']} | {_percent(found['value'])} | {_interval(found)} | "
            f"{found['problems']} | | | | | |"
        )
    for name, item in results["benchmarks"].items():
        for metric, categories in item.get("categories", {}).items():
            lines += [
                "",
                f"## {name}, {metric} by category",
                "",
                "| category | problems | value |",
                "|---|--:|--:|",
            ]
            lines += [
                f"| {category} | {found['problems']} | {_percent(found['value'])} |"
                for category, found in categories.items()
            ]
    return "\n".join(lines) + "\n"


def row_markdown(results: Mapping[str, Any]) -> str:
    """The header and the policy's row of a comparison table, in percent."""
    row = row_of(results)
    head = f"| policy | {' | '.join(row)} |\n|---|{'--:|' * len(row)}\n"
    return f"{head}| {results['policy']['name']} | {' | '.join(map(_percent, row.values()))} |\n"


def write(folder: Path, results: Mapping[str, Any], problems: Sequence[ProblemResult]) -> None:
    """Write all files of the results except the answers. Each file is written atomically."""
    lines = "".join(json.dumps(asdict(item)) + "\n" for item in problems)
    texts = {
        PROBLEMS: lines,
        TABLE: markdown(results),
        ROW: row_markdown(results),
        RESULTS: json.dumps(results, indent=2) + "\n",
    }
    for name, text in texts.items():
        write_whole(folder / name, text)


def read_problems(folder: Path) -> list[ProblemResult]:
    """Read the problem results from an evaluation's folder.

    Raises:
        ValueError: the folder has no finished evaluation.
    """
    path = folder / PROBLEMS
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no evaluation: {PROBLEMS} is not there (megatron-chord evaluate writes it)"
        )
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [ProblemResult(**item | {"scores": tuple(item["scores"])}) for item in found]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(found: Mapping[str, Any]) -> str:
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f}" if found["value"] is not None else "-"
