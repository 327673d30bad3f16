"""`megatron-chord compare A B`: two policies on the same problems, problem by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_chord.evaluation.metrics import Interval, bootstrap
from megatron_chord.evaluation.results import ProblemResult, read_problems

_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of one benchmark. Values are in [0, 1], differences B - A."""

    benchmark: str
    metric: str
    a: float
    b: float
    """Means of A and B over the problems that both have."""
    difference: Interval
    """Paired bootstrap interval of the mean difference over problems."""
    num_problems: int
    gained: tuple[str, ...]
    """Problems that flipped to right: below one half for A, at least one half for B."""
    lost: tuple[str, ...]
    """Problems that flipped to wrong: at least one half for A, below one half for B."""


def compare(a: Path, b: Path, *, seed: int = 0, resamples: int = 2000) -> tuple[list[Comparison], list[str]]:
    """Compare all metrics that both evaluations have. Also returns remarks on what only one of them has.

    Raises:
        ValueError: a folder holds no evaluation; the same problem has other messages or another truth; or they have no
            metric in common.
    """
    first, second = (
        {(item.benchmark, item.problem): item for item in read_problems(path)} for path in (a, b)
    )
    both = [key for key in first if key in second]
    changed = [key for key in both if first[key].question != second[key].question]
    if changed:
        raise ValueError(
            f"{len(changed)} problems have other messages or another truth in {b} than in {a}, such as "
            f"{' '.join(changed[0])}: evaluate both policies with the same suite and files"
        )
    remarks = [
        f"{len(whole) - len(both)} problems are only in {path}"
        for path, whole in ((a, first), (b, second))
        if len(whole) > len(both)
    ]
    found: list[Comparison] = []
    for benchmark in dict.fromkeys(name for name, _ in both):
        pairs = [(first[key], second[key]) for key in both if key[0] == benchmark]
        for metric in pairs[0][0].values:
            if metric in pairs[0][1].values:
                found += _compared(benchmark, metric, pairs, seed, resamples)
    if not found:
        raise ValueError(f"{a} and {b} have no common metric of a benchmark")
    return found, remarks


def _compared(
    benchmark: str,
    metric: str,
    pairs: Sequence[tuple[ProblemResult, ProblemResult]],
    seed: int,
    resamples: int,
) -> list[Comparison]:
    """The comparison of one metric; empty if no problem has it in both evaluations."""
    values = [
        (a.problem, x, y)
        for a, b in pairs
        if (x := a.values[metric]) is not None and (y := b.values[metric]) is not None
    ]
    if not values:
        return []
    count = len(values)
    return [
        Comparison(
            benchmark=benchmark,
            metric=metric,
            a=sum(x for _, x, _ in values) / count,
            b=sum(y for _, _, y in values) / count,
            difference=bootstrap([[y - x for _, x, y in values]], seed=seed, resamples=resamples),
            num_problems=count,
            gained=tuple(problem for problem, x, y in values if x < _HALF <= y),
            lost=tuple(problem for problem, x, y in values if y < _HALF <= x),
        )
    ]
