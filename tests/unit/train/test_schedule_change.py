"""How the learning rate changes when a run is resumed with more steps."""

from __future__ import annotations

import math

import pytest

from megatron_chord.config import OptimConfig, RunConfig
from megatron_chord.config_io import load_config, plain_settings
from megatron_chord.train.schedule_change import schedule_change
from megatron_chord.train.state import learning_rate_at
from tests.support.ranks import ROOT

EXAMPLE = ROOT / "examples" / "arithmetic" / "chord_phi.yaml"
DECAYING = ("optim.lr=1e-3", "optim.warmup_steps=0")


def given(*overrides: str) -> RunConfig:
    return load_config(EXAMPLE, [*DECAYING, *overrides])


@pytest.mark.parametrize("step", [0, 1, 7, 9, 10, 15])
def test_the_rate_by_hand(step: int) -> None:
    """In the last update before ``decay_steps`` the rate is still above ``min_lr``; afterwards it is ``min_lr``."""
    progress = min((step + 1) / 11, 1)
    linear = OptimConfig(lr=1e-3, min_lr=1e-4, schedule="linear", decay_steps=10)
    assert learning_rate_at(linear, steps=20, step=step) == pytest.approx(1e-4 + 9e-4 * (1 - progress))
    cosine = OptimConfig(lr=1e-3, schedule="cosine")
    expected = 1e-3 * (math.cos(math.pi * progress) + 1) / 2
    assert learning_rate_at(cosine, steps=10, step=step) == pytest.approx(expected, abs=1e-12)


def test_a_restarted_schedule_has_the_same_horizon() -> None:
    linear = OptimConfig(lr=1e-3, schedule="linear")
    assert learning_rate_at(linear, steps=10, step=6, since=6) == pytest.approx(1e-3 * (1 - 1 / 5))


def test_more_steps_say_what_the_rate_becomes() -> None:
    """At step 41, 41/61 of the old schedule and 41/101 of the new one have passed."""
    old = plain_settings(given("optim.schedule=linear", "steps=60"))
    assert schedule_change(old, given("optim.schedule=linear", "steps=100"), step=40) == (
        "optim.schedule linear now decays until step 100, not 60: the learning rate of step 41 is 0.000594, not "
        "0.000328. To keep the old schedule: optim.decay_steps=60 and optim.min_lr=RATE, a rate above 0 for the steps "
        "after 60"
    )
    floor = given("optim.schedule=linear", "steps=100", "optim.min_lr=1e-5")
    remark = schedule_change(old, floor, step=40)
    assert remark is not None
    assert remark.endswith("To keep the old schedule: optim.decay_steps=60")


def test_the_same_horizon_says_nothing() -> None:
    old = plain_settings(given("optim.schedule=cosine", "steps=60"))
    kept = given("optim.schedule=cosine", "steps=100", "optim.decay_steps=60", "optim.min_lr=1e-6")
    assert schedule_change(old, kept, step=40) is None
    assert schedule_change(plain_settings(given("steps=60")), given("steps=100"), step=40) is None
    assert schedule_change({}, given("optim.schedule=cosine"), step=40) is None
