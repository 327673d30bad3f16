"""Metrics of a policy, computed from the grades of a problem's answers: pure functions without model or file.

Every metric gives one number for each problem; the benchmark's number is their mean. Grades are in [0, 1]; an answer is
right when its grade is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import numpy as np

from megatron_chord.config_suite import METRIC

K = TypeVar("K")
Kind = Literal["avg", "pass", "maj"]
_CHUNK = 1 << 22
"""Number of resampled problems that are processed at a time."""


@dataclass(frozen=True)
class Metric:
    """A metric as a suite names it: ``avg@32``, ``pass@8``, ``maj@8``."""

    kind: Kind
    k: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.k}"


@dataclass(frozen=True)
class Graded:
    """One answer of a problem."""

    score: float
    vote: int | None
    """Answers with the same vote are equal. 0 is the truth. None: the response states no answer."""


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def read_metric(name: str) -> Metric:
    """The metric with this name.

    Raises:
        ValueError: the name is not that of a metric.
    """
    match = METRIC.fullmatch(name)
    if match is None:
        raise ValueError(f"metric {name!r} is none of avg@K, pass@K and maj@K, such as avg@32")
    return Metric(cast(Kind, match[1]), int(match[2]))


def value_of(metric: Metric, answers: Sequence[Graded]) -> float | None:
    """The metric of one problem; None if there are fewer answers than it needs.

    ``avg@k`` uses the first k answers, the others all of them.
    """
    if len(answers) < metric.k:
        return None
    if metric.kind == "avg":
        return avg_at([answer.score for answer in answers], metric.k)
    if metric.kind == "pass":
        return pass_at(len(answers), sum(answer.score >= 1 for answer in answers), metric.k)
    return maj_at([answer.vote for answer in answers], metric.k)


def avg_at(scores: Sequence[float], k: int) -> float:
    """avg@k: the mean of the first ``k`` grades, [0, 1].

    Raises:
        ValueError: there are fewer.
    """
    _require_enough(len(scores), k)
    return sum(scores[:k]) / k


def pass_at(n: int, num_right: int, k: int) -> float:
    """pass@k: the probability that at least one of ``k`` of the ``n`` answers is right, drawn without replacement.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), as a product.

    Raises:
        ValueError: there are fewer than ``k`` answers.
    """
    _require_enough(n, k)
    if n - num_right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - num_right + 1, n + 1))


def maj_at(votes: Sequence[int | None], k: int) -> float:
    """maj@k: the probability that the truth (vote 0) wins the vote of ``k`` of the answers, without replacement.

    The field has three definitions: one vote of the first k answers (lm-eval, lighteval), the average over all subsets
    of k answers (NeMo-RL), and over subsets drawn with replacement (verl). This is the second, computed exactly. It
    does not depend on the order of the answers, and it needs no seed. Answers that tie for the most votes share the
    vote. A response without an answer (None) does not vote, but counts towards the k.

    The sum over subsets is a product of polynomials: class i with n_i answers gives x^j with weight C(n_i, j).

    Raises:
        ValueError: there are fewer than ``k`` answers.
    """
    _require_enough(len(votes), k)
    sizes: dict[int, int] = {}
    for vote in votes:
        if vote is not None:
            sizes[vote] = sizes.get(vote, 0) + 1
    num_right = sizes.pop(0, 0)
    silent = sum(vote is None for vote in votes)
    total = 0.0
    for most in range(1, min(num_right, k) + 1):
        # ways[t][j]: number of ways to take j answers from the other classes so that t of these classes have the
        # truth's number of votes, `most`.
        ways = [[math.comb(silent, j) for j in range(k - most + 1)]]
        for size in sizes.values():
            ways = _with_class(ways, size, most, k - most)
        share = sum(row[k - most] / (tied + 1) for tied, row in enumerate(ways))
        total += math.comb(num_right, most) * share
    return total / math.comb(len(votes), k)


def _with_class(ways: list[list[int]], size: int, most: int, room: int) -> list[list[int]]:
    """``ways`` after adding one more class of ``size`` answers, of which at most ``most`` are taken."""
    grown = [[0] * (room + 1) for _ in range(len(ways) + 1)]
    for tied, row in enumerate(ways):
        for taken, count in enumerate(row):
            if count:
                for more in range(min(size, most, room - taken) + 1):
                    grown[tied + (more == most)][taken + more] += count * math.comb(size, more)
    return grown


def by_category(values: Mapping[K, float], category_of: Mapping[K, str]) -> dict[str, tuple[int, float]]:
    """Number of problems and mean value of each category, in the order of the names.

    Args:
        values: of each problem.
        category_of: of each of these problems.
    """
    groups: dict[str, list[float]] = {}
    for problem, value in values.items():
        groups.setdefault(category_of[problem], []).append(value)
    return {name: (len(group), sum(group) / len(group)) for name, group in sorted(groups.items())}


def bootstrap(
    groups: Sequence[Sequence[float]],
    *,
    seed: int,
    weigh: Literal["problems", "groups"] = "problems",
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """The mean over problems with its percentile interval: each group's problems are resampled with replacement.

    Args:
        groups: the values of each benchmark's problems; usually one benchmark.
        weigh: ``problems``: every problem counts the same. ``groups``: every benchmark counts the same.

    Raises:
        ValueError: there is no problem, or a group has none.
    """
    if not groups or not all(groups):
        raise ValueError("there is no problem to average over")
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    sizes = np.array([len(array) for array in arrays])
    weights = sizes / sizes.sum() if weigh == "problems" else np.full(len(arrays), 1 / len(arrays))
    random = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for array, weight in zip(arrays, weights, strict=True):
        rows = max(1, _CHUNK // len(array))
        for start in range(0, resamples, rows):
            count = min(rows, resamples - start)
            drawn = array[random.integers(len(array), size=(count, len(array)))]
            means[start : start + count] += weight * drawn.mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = sum(weight * array.mean() for array, weight in zip(arrays, weights, strict=True))
    return Interval(float(value), float(low), float(high))


def _require_enough(n: int, k: int) -> None:
    if not 0 < k <= n:
        raise ValueError(f"{n} answers are not enough for k = {k}")
