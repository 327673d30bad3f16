"""mu at steps picked by hand."""

from __future__ import annotations

import math

import pytest

from megatron_chord.config import MuConfig
from megatron_chord.losses.mu import mu_at, warmup_cosine


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # Up from 0 over 4 steps: 0.9 x step / 4.
        (0, 0.0),
        (1, 0.225),
        (2, 0.45),
        (3, 0.675),
        # Down over 8: 0.05 + 0.85 (1 + cos(pi (step - 4) / 8)) / 2.
        (4, 0.9),
        (6, 0.05 + 0.425 * (1 + math.sqrt(0.5))),
        (8, 0.475),
        (10, 0.05 + 0.425 * (1 - math.sqrt(0.5))),
        # And then the valley.
        (12, 0.05),
        (13, 0.05),
        (10**6, 0.05),
    ],
)
def test_warmup_then_cosine_then_valley(step: int, expected: float) -> None:
    mu = MuConfig(schedule="warmup_cosine", peak=0.9, valley=0.05, warmup_steps=4, decay_steps=8)
    assert mu_at(step, mu) == pytest.approx(expected, rel=1e-14)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    mu = MuConfig(schedule="warmup_cosine", peak=0.9, valley=0.1, decay_steps=2)
    assert [mu_at(step, mu) for step in range(4)] == pytest.approx([0.9, 0.5, 0.1, 0.1], rel=1e-14)


def test_without_decay_the_valley_follows_the_warmup() -> None:
    mu = MuConfig(schedule="warmup_cosine", peak=0.8, valley=0.1, warmup_steps=2)
    assert [mu_at(step, mu) for step in range(4)] == [0.0, 0.4, 0.1, 0.1]


@pytest.mark.parametrize("step", [0, 1, 7, 10**6])
def test_without_warmup_and_decay_it_is_the_valley(step: int) -> None:
    assert warmup_cosine(step, peak=0.9, valley=0.1, warmup_steps=0, decay_steps=0) == 0.1


@pytest.mark.parametrize("peak", [0.0, 0.1, 1.0])
def test_constant(peak: float) -> None:
    assert [mu_at(step, MuConfig(peak=peak)) for step in (0, 1, 10**6)] == [peak] * 3


def test_a_rising_cosine_is_allowed() -> None:
    mu = MuConfig(schedule="warmup_cosine", peak=0.0, valley=1.0, decay_steps=4)
    assert [mu_at(step, mu) for step in range(5)] == pytest.approx(
        [0.0, 0.5 - 0.5 * math.sqrt(0.5), 0.5, 0.5 + 0.5 * math.sqrt(0.5), 1.0], rel=1e-14
    )
