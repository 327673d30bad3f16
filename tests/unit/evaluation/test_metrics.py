"""Metrics of evaluation agree with hand computations and with the sum over all subsets."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest

from megatron_chord.evaluation.metrics import (
    Graded,
    Metric,
    avg_at,
    bootstrap,
    by_category,
    maj_at,
    pass_at,
    read_metric,
    value_of,
)


def test_avg_is_the_mean_of_the_first_k_grades() -> None:
    assert avg_at([1.0, 0.0, 1.0, 1.0], 4) == 0.75
    assert avg_at([1.0, 0.0, 1.0, 1.0], 2) == 0.5
    with pytest.raises(ValueError, match="2 answers are not enough for k = 3"):
        avg_at([1.0, 0.0], 3)


@pytest.mark.parametrize(
    ("n", "num_right", "k", "expected"),
    [
        (8, 3, 1, 3 / 8),
        (8, 3, 2, 1 - (5 * 4) / (8 * 7)),  # 1 - C(5,2)/C(8,2) = 18/28
        (8, 3, 6, 1.0),  # five wrong answers do not fill six places
        (4, 0, 2, 0.0),
        (4, 4, 4, 1.0),
        (5, 1, 4, 4 / 5),
    ],
)
def test_pass_by_hand(n: int, num_right: int, k: int, expected: float) -> None:
    assert pass_at(n, num_right, k) == pytest.approx(expected, abs=1e-15)


def test_pass_is_the_share_of_all_subsets_with_a_right_answer() -> None:
    for n, num_right, k in [(7, 2, 3), (9, 4, 4), (6, 5, 2)]:
        subsets = list(itertools.combinations([True] * num_right + [False] * (n - num_right), k))
        assert pass_at(n, num_right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_maj_by_hand() -> None:
    # Three wrong (a), two right, one wrong (c): 20 subsets of 3. Only in {r,r,a} x 3 and {r,r,c} x 1 does the truth win
    # alone.
    # It ties with two others in {r,a,c}: 2 x 3 x 1 = 6 subsets of 1/3 each. (4 + 2) / 20.
    assert maj_at([1, 1, 1, 0, 0, 2], 3) == pytest.approx(0.30, abs=1e-15)
    # k = 1 gives the share of right answers. Responses without an answer count.
    assert maj_at([0, None, 1, 0], 1) == 0.5
    # All four: two right votes against one wrong. The response without an answer does not vote.
    assert maj_at([0, None, 1, 0], 4) == 1.0
    # The truth gets no vote.
    assert maj_at([1, 2, None], 2) == 0.0
    # A right answer among responses without an answer wins wherever it is drawn: in 3 of the 6 pairs.
    assert maj_at([0, None, None, None], 2) == 0.5


def _maj_of_all_subsets(votes: Sequence[int | None], k: int) -> float:
    total, count = 0.0, 0
    for subset in itertools.combinations(votes, k):
        counts = Counter(vote for vote in subset if vote is not None)
        first = [vote for vote, number in counts.items() if number == max(counts.values())]
        total += 1 / len(first) if 0 in first else 0.0
        count += 1
    return total / count


def test_maj_is_the_mean_over_all_subsets() -> None:
    cases = [
        ([0, 0, 0, 1, 1, 2, 2, 3, None], 4),
        ([0, 1, 1, 1, 1, 0, 2, None, None, 0], 5),
        ([0, 0, 1, 2, 3, 4, 5, 6], 8),
        ([1, 1, 0], 2),
    ]
    for votes, k in cases:
        assert maj_at(votes, k) == pytest.approx(_maj_of_all_subsets(votes, k), abs=1e-12)


def test_names_of_metrics() -> None:
    assert read_metric("avg@32") == Metric("avg", 32)
    assert str(read_metric("maj@8")) == "maj@8"
    for name in ("avg", "mean@3", "pass@0", "pass@-1", "avg@3x"):
        with pytest.raises(ValueError, match="is none of avg@K, pass@K and maj@K"):
            read_metric(name)


def test_a_metric_of_too_few_answers_has_no_value() -> None:
    answers = [Graded(1.0, 0), Graded(0.0, 1), Graded(0.5, None)]
    assert value_of(Metric("avg", 3), answers) == 0.5
    assert value_of(Metric("pass", 2), answers) == pytest.approx(
        2 / 3
    )  # one of three is right; half right is not
    assert value_of(Metric("maj", 3), answers) == 0.5
    assert value_of(Metric("avg", 4), answers) is None


def test_categories() -> None:
    values = {"a": 1.0, "b": 0.0, "c": 0.5}
    assert by_category(values, {"a": "x", "b": "y", "c": "x"}) == {"x": (2, 0.75), "y": (1, 0.0)}


def test_the_interval_of_a_share_is_the_binomials() -> None:
    # 40 of 100 problems: the bootstrap draws Binomial(100, 0.4) / 100, whose deviation is sqrt(0.24 / 100) = 0.049.
    found = bootstrap([[1.0] * 40 + [0.0] * 60], seed=0, resamples=20_000)
    assert found.value == pytest.approx(0.4)
    deviation = math.sqrt(0.4 * 0.6 / 100)
    assert found.low == pytest.approx(0.4 - 1.96 * deviation, abs=0.011)
    assert found.high == pytest.approx(0.4 + 1.96 * deviation, abs=0.011)
    assert bootstrap([[1.0] * 40 + [0.0] * 60], seed=0, resamples=20_000) == found
    assert bootstrap([[0.25] * 7], seed=3) == bootstrap([[0.25]], seed=4)


def test_groups_are_weighed_by_problems_or_alike() -> None:
    groups = [[1.0] * 30, [0.0] * 10]
    by_problems = bootstrap(groups, seed=1)
    # Each group is drawn separately, so a mean of constant groups does not vary.
    assert (by_problems.value, by_problems.low, by_problems.high) == (0.75, 0.75, 0.75)
    assert bootstrap(groups, seed=1, weigh="groups").value == 0.5
    with pytest.raises(ValueError, match="there is no problem to average over"):
        bootstrap([[1.0], []], seed=0)
