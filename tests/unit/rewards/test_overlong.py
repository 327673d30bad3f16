from __future__ import annotations

import pytest

from megatron_chord.rewards.overlong import overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),
    [
        (0, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (17408, -0.25),
        (18432, -0.5),
        (20480, -1.0),
        (20481, -1.0),
        (99999, -1.0),
    ],
)
def test_numbers_of_the_paper(length: int, penalty: float) -> None:
    assert overlong_penalty(length, limit=20480, cache=4096) == penalty
    assert overlong_penalty(length, limit=20480, cache=4096, factor=0.5) == penalty / 2


def test_cache_of_the_whole_limit() -> None:
    assert [overlong_penalty(n, limit=4, cache=4) for n in range(5)] == [0.0, -0.25, -0.5, -0.75, -1.0]
