"""The numbers of a benchmark, compared with hand arithmetic from its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chord.config_suite import BenchmarkConfig, MeanConfig, SamplingConfig, SuiteConfig
from megatron_chord.evaluation import results
from megatron_chord.evaluation.answers import Answer
from megatron_chord.records import Prompt
from megatron_chord.rewards.kinds.exact import ExactReward


def benchmark(name: str, samples: int, *metrics: str) -> BenchmarkConfig:
    return BenchmarkConfig(
        name=name,
        file="x",
        category="subject",
        sampling=SamplingConfig(samples=samples, temperature=1.0),
        reward=ExactReward(),
        metrics=metrics,
    )


def answers(problem: str, scores: list[float | None], finish: str = "stop") -> list[Answer]:
    return [
        Answer(
            key=f"{problem}{i}",
            problem=problem,
            sample=i,
            response="",
            tokens=10 * (i + 1),
            finish_reason=finish,
            score=score,
            error=None if score is not None else "killed",
            graded_by="",
        )
        for i, score in enumerate(scores)
    ]


def prompt(name: str) -> Prompt:
    return Prompt(id=name, messages=({"role": "user", "content": name},), truth="1", token_ids=(1,))


def test_one_benchmark() -> None:
    item = benchmark("b", 4, "avg@2", "pass@2")
    groups = {
        "p": answers("p", [1.0, 0.0, 0.0, 0.0]),
        "q": answers("q", [1.0, 1.0, None, 1.0], finish="length"),
        "r": answers("r", [0.0]),  # three requests were late
    }
    problems = [
        results.problem_result(
            item, prompt(name), subject, group, [None] * sum(a.score is not None for a in group)
        )
        for (name, group), subject in zip(groups.items(), ("x", "x", "y"), strict=True)
    ]
    assert problems[0].values == {"avg@2": 0.5, "pass@2": 0.5}
    assert problems[1].values == {"avg@2": 1.0, "pass@2": 1.0}
    assert problems[2].values == {"avg@2": None, "pass@2": None}
    found = results.benchmark_result(
        item, problems, [answer for group in groups.values() for answer in group], resamples=100, seed=0
    )
    assert found["metrics"]["avg@2"]["value"] == 0.75
    assert found["metrics"]["avg@2"]["problems"] == 2
    assert found["truncated"] == pytest.approx(4 / 9)
    assert (found["grader_errors"], found["missing"], found["answers"]) == (1, 3, 9)
    assert found["response_tokens"] == {"mean": pytest.approx(210 / 9), "median": 20, "max": 40}
    assert found["categories"]["avg@2"] == {"x": {"problems": 2, "value": 0.75}}


def test_a_mean_weighs_problems_or_benchmarks(tmp_path: Path) -> None:
    items = (benchmark("a", 1, "avg@1"), benchmark("b", 1, "avg@1"))
    problems = [
        results.problem_result(items[0], prompt(f"a{i}"), None, answers(f"a{i}", [1.0]), [0])
        for i in range(3)
    ] + [results.problem_result(items[1], prompt("b0"), None, answers("b0", [0.0]), [None])]
    suite = SuiteConfig(
        benchmarks=items,
        means=(
            MeanConfig(name="overall", of=("a", "b")),
            MeanConfig(name="plain", of=("a", "b"), weigh="benchmarks"),
        ),
    )
    found = results.means(suite, problems)
    assert (found["overall"]["value"], found["plain"]["value"]) == (0.75, 0.5)
    whole = {
        "suite": "s",
        "seed": 0,
        "policy": {"name": "n", "path": "p", "digest": "d"},
        "benchmarks": {
            item.name: results.benchmark_result(
                item,
                [problem for problem in problems if problem.benchmark == item.name],
                answers("x", [1.0]),
                resamples=10,
                seed=0,
            )
            for item in items
        },
        "means": found,
    }
    results.write(tmp_path, whole, problems)
    assert results.read_problems(tmp_path) == problems
    row = (tmp_path / "row.md").read_text().splitlines()[-1]
    assert row == "| n | 100.0 % | 0.0 % | 75.0 % | 50.0 % |"
    assert "| **overall** | avg@1 | 75.0 % | 75.0 to 75.0 | 4 |" in (tmp_path / "results.md").read_text()
