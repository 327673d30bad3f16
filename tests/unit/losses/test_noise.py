"""The noise of the two branches: numbers by hand, and any split into micro-batches has the same sums."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_chord.losses.noise import NUMBER, NoiseMeasurement, trimmed_variance
from megatron_chord.losses.terms import TermTokens, TokenStats


def tokens(index: list[int], lengths: list[int], column: str, values: list[float]) -> TermTokens:
    """Tokens of whole sequences. ``values`` has one constant for each sequence."""
    sequence = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
    return TermTokens(
        index=torch.tensor(index, dtype=torch.int64),
        sequence=sequence,
        lengths=torch.tensor(lengths, dtype=torch.float32),
        held=torch.tensor(lengths, dtype=torch.int64),
        columns={column: torch.tensor(values)[sequence]},
    )


def stats(p: list[float]) -> TokenStats:
    return TokenStats(torch.tensor(p, dtype=torch.float64).log(), torch.zeros(len(p)), None)


P = [0.5, 0.2, 0.9, 0.5, 0.1, 1.0]
WHOLE = {
    "policy": tokens([0, 1, 2], [2, 1], "advantage", [1.0, -0.5]),
    "sft": tokens([3, 4, 5], [1, 2], NUMBER, [0.0, 1.0]),
}


@pytest.mark.parametrize(
    ("uses_phi", "apart"),
    [
        # Rollouts: ((0.25 - 1)^2 + (0.16 - 1)^2) / 2 and (0.09 + 0.5)^2; demonstrations: 0.25^2 and (0.09^2 + 0) / 2.
        (True, ((0.75**2 + 0.84**2) / 2 + 0.59**2 + 0.0625 + 0.00405) / 4),
        # Rollouts: 0 and 1.5^2; demonstrations: 1 and 1.
        (False, (2.25 + 1 + 1) / 4),
    ],
)
def test_numbers_by_hand(uses_phi: bool, apart: float) -> None:
    measurement = NoiseMeasurement(demonstrations=2, uses_phi=uses_phi, trim=0.1)
    found = measurement.finish(measurement.sums(stats(P), WHOLE).tolist())
    nlls = math.log(2), math.log(10) / 2
    assert found == {
        "advantage_variance": pytest.approx(0.75**2),
        "nll_variance": pytest.approx(((nlls[0] - nlls[1]) / 2) ** 2),
        "disagreement": pytest.approx(apart),
    }


def test_two_micro_batches_have_the_sums_of_one() -> None:
    measurement = NoiseMeasurement(demonstrations=2, uses_phi=True, trim=0.0)
    nothing = tokens([], [], "advantage", [])
    first = {"policy": tokens([0, 1], [2], "advantage", [1.0]), "sft": tokens([2, 3], [2], NUMBER, [1.0])}
    second = {"policy": tokens([0], [1], "advantage", [-0.5]), "sft": tokens([1], [1], NUMBER, [0.0])}
    split = measurement.sums(stats([*P[:2], *P[4:]]), first) + measurement.sums(stats(P[2:4]), second)
    split += measurement.sums(stats([]), {"policy": nothing})
    torch.testing.assert_close(split, measurement.sums(stats(P), WHOLE))


def test_nothing_is_found_without_rollouts_or_without_demonstrations() -> None:
    measurement = NoiseMeasurement(demonstrations=2, uses_phi=True, trim=0.0)
    for name in WHOLE:
        assert measurement.finish(measurement.sums(stats(P), {name: WHOLE[name]}).tolist()) == {}


@pytest.mark.parametrize(
    ("values", "trim", "expected"),
    [
        ([1.0, 3.0], 0.4, 1.0),  # fewer than 4: nothing is left out
        ([5.0, -90.0, 3.0, 99.0], 0.25, 1.0),
        ([5.0, 3.0, 5.0, 3.0], 0.24, 1.0),
        ([7.0], 0.1, 0.0),
    ],
)
def test_trimmed_variance(values: list[float], trim: float, expected: float) -> None:
    assert trimmed_variance(values, trim) == expected
