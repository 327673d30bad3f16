"""mu at some steps is computed by hand, and some properties hold at all steps."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from megatron_chord.schedules import (
    Binary,
    Constant,
    GradientNorm,
    Learned,
    Linear,
    MuSchedule,
    NoiseAware,
    Periodic,
    RewardAdaptive,
    Schedule,
    ScheduleInput,
    WarmupCosine,
)

PLAIN = (Constant, WarmupCosine, Linear, Binary, Periodic)


def at(mu: Schedule, step: int, **now: Any) -> float:
    return mu.value(ScheduleInput(step=step, **now))


def course(mu: Schedule, steps: int, **now: Any) -> list[float]:
    return [at(mu, step, **now) for step in range(steps)]


# Constant


@pytest.mark.parametrize("peak", [0.0, 0.1, 1.0])
def test_constant(peak: float) -> None:
    mu = Constant(peak=peak)
    assert [at(mu, step) for step in (0, 1, 10**6)] == [peak] * 3
    assert mu.bounds() == (peak, peak)


def test_the_default_is_chord_phi() -> None:
    assert at(Constant(), 0) == 0.1


# Warm-up, then a fall


@pytest.mark.parametrize(
    ("step", "cosine", "line"),
    [
        # Up from 0 over 4 steps: 0.9 x step / 4.
        (0, 0.0, 0.0),
        (1, 0.225, 0.225),
        (2, 0.45, 0.45),
        (3, 0.675, 0.675),
        # Down over 8: 0.05 + 0.85 (1 + cos(pi (step - 4) / 8)) / 2, or 0.05 + 0.85 (1 - (step - 4) / 8).
        (4, 0.9, 0.9),
        (5, 0.05 + 0.425 * (1 + math.cos(math.pi / 8)), 0.79375),
        (6, 0.05 + 0.425 * (1 + math.sqrt(0.5)), 0.6875),
        (8, 0.475, 0.475),
        (10, 0.05 + 0.425 * (1 - math.sqrt(0.5)), 0.2625),
        # After that, the valley.
        (12, 0.05, 0.05),
        (13, 0.05, 0.05),
        (10**6, 0.05, 0.05),
    ],
)
def test_up_then_down_then_flat(step: int, cosine: float, line: float) -> None:
    settings = {"peak": 0.9, "valley": 0.05, "warmup_steps": 4, "decay_steps": 8}
    assert at(WarmupCosine(**settings), step) == pytest.approx(cosine, rel=1e-14)
    assert at(Linear(**settings), step) == pytest.approx(line, rel=1e-14)


@pytest.mark.parametrize("kind", [WarmupCosine, Linear])
def test_counting_from_one_is_one_step_ahead(kind: type[WarmupCosine | Linear]) -> None:
    settings = {"peak": 0.9, "valley": 0.05, "warmup_steps": 4, "decay_steps": 8}
    assert course(kind(**settings, first_step=1), 20) == course(kind(**settings), 21)[1:]


def test_without_warmup_counting_from_zero_starts_at_the_peak_and_counting_from_one_does_not() -> None:
    swift = WarmupCosine(peak=0.9, valley=0.05, decay_steps=200)
    trinity = WarmupCosine(peak=0.9, valley=0.05, decay_steps=200, first_step=1)
    assert at(swift, 0) == 0.9
    assert at(trinity, 0) == pytest.approx(0.05 + 0.425 * (1 + math.cos(math.pi / 200)), rel=1e-14)
    assert at(swift, 199) == pytest.approx(0.05 + 0.425 * (1 - math.cos(math.pi / 200)), rel=1e-12)
    assert at(swift, 200) == at(trinity, 199) == 0.05
    assert trinity.bounds() == (0.05, at(trinity, 0))


def test_with_warmup_only_counting_from_zero_begins_with_mu_0() -> None:
    settings = {"peak": 0.8, "valley": 0.2, "warmup_steps": 2, "decay_steps": 1}
    assert course(Linear(**settings), 4) == [0.0, 0.4, 0.8, 0.2]
    assert course(Linear(**settings, first_step=1), 4) == [0.4, 0.8, 0.2, 0.2]
    assert Linear(**settings).bounds() == (0.0, 0.8)
    assert Linear(**settings, first_step=1).bounds() == (0.2, 0.8)


@pytest.mark.parametrize("kind", [WarmupCosine, Linear])
def test_without_decay_the_valley_follows_the_warmup(kind: type[WarmupCosine | Linear]) -> None:
    mu = kind(peak=0.8, valley=0.1, warmup_steps=2)
    assert course(mu, 4) == [0.0, 0.4, 0.1, 0.1]
    assert mu.bounds() == (0.0, 0.4)  # the peak is never reached


@pytest.mark.parametrize("kind", [WarmupCosine, Linear])
@pytest.mark.parametrize("first_step", [0, 1])
def test_without_warmup_and_decay_it_is_the_valley(
    kind: type[WarmupCosine | Linear], first_step: int
) -> None:
    mu = kind(peak=0.9, valley=0.1, first_step=first_step)
    assert [at(mu, step) for step in (0, 1, 7, 10**6)] == [0.1] * 4
    assert mu.bounds() == (0.1, 0.1)


def test_it_may_rise() -> None:
    mu = WarmupCosine(peak=0.0, valley=1.0, decay_steps=4)
    assert course(mu, 5) == pytest.approx(
        [0.0, 0.5 - 0.5 * math.sqrt(0.5), 0.5, 0.5 + 0.5 * math.sqrt(0.5), 1.0], rel=1e-14
    )
    assert course(Linear(peak=0.0, valley=1.0, decay_steps=4), 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", [WarmupCosine, Linear])
def test_mu_0_and_1_are_exact(kind: type[WarmupCosine | Linear]) -> None:
    """At a step of exactly 0 or 1 a branch is skipped."""
    for valley in (0.0, 0.05, 0.1, 1 / 3):
        assert at(kind(peak=1.0, valley=valley, decay_steps=3), 0) == 1.0
        assert at(kind(peak=0.0, valley=valley, decay_steps=3), 0) == 0.0
        assert at(kind(peak=valley, valley=0.0, decay_steps=3), 3) == 0.0


# Binary and periodic


def test_binary() -> None:
    mu = Binary(switch_step=3)
    assert course(mu, 6) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert mu.bounds() == (0.0, 1.0)
    assert Binary(switch_step=0).bounds() == (0.0, 0.0)


def test_periodic() -> None:
    assert course(Periodic(), 5) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert course(Periodic(sft_steps=2, policy_steps=3), 12) == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]


def test_the_optimizer_is_reset_once_and_only_on_request() -> None:
    assert [
        step for step in range(9) if Binary(switch_step=4, reset_optimizer=True).resets_optimizer(step)
    ] == [4]
    assert not any(Binary(switch_step=4).resets_optimizer(step) for step in range(9))
    assert not any(Binary(switch_step=0, reset_optimizer=True).resets_optimizer(step) for step in range(9))
    for mu in (m for m in everything() if not isinstance(m, Binary)):
        assert not any(mu.resets_optimizer(step) for step in range(9))


# Reward-adaptive


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(-1.0, 1.0), (-0.5, 1.0), (-0.25, 0.75), (0.0, 0.5), (0.25, 0.25), (0.5, 0.0), (1.0, 0.0)],
)
def test_reward_adaptive_is_clamped_on_both_sides(reward: float, expected: float) -> None:
    assert at(RewardAdaptive(tau=0.5), 3, reward_mean=reward) == expected


def test_reward_adaptive_needs_the_rewards() -> None:
    assert RewardAdaptive().needs_rewards
    assert [type(mu) for mu in everything() if mu.needs_rewards and not isinstance(mu, RewardAdaptive)] == []
    with pytest.raises(ValueError, match="rewards"):
        at(RewardAdaptive(), 0)


# By gradient norm


def norms(latest: float, warm: float) -> dict[str, float]:
    return {"sft_grad_norm": latest, "warm_grad_norm": warm}


def share(mu: GradientNorm, memory: Mapping[str, float], seeds: int = 4000) -> float:
    return sum(at(mu, 9, seed=seed, memory=memory) for seed in range(seeds)) / seeds


def test_gradient_norm_begins_with_sft() -> None:
    assert course(GradientNorm(warmup_steps=5), 5) == [1.0] * 5


@pytest.mark.parametrize(
    ("gamma", "latest", "warm", "odds"),
    [
        (1.0, 2.0, 2.0, 0.5),
        (1.0, 1.0, 3.0, 0.25),
        (0.25, 1.0, 1.0, 0.8),
        (4.0, 1.0, 1.0, 0.2),
    ],
)
def test_the_odds_are_those_of_the_norms(gamma: float, latest: float, warm: float, odds: float) -> None:
    mu = GradientNorm(warmup_steps=5, gamma=gamma)
    # 4000 draws: a standard deviation of at most 0.008.
    assert share(mu, norms(latest, warm)) == pytest.approx(odds, abs=0.03)
    steps = [at(mu, step, seed=7, memory=norms(latest, warm)) for step in range(5, 4005)]
    assert set(steps) == {0.0, 1.0}
    assert sum(steps) / 4000 == pytest.approx(odds, abs=0.03)


def test_the_odds_at_the_ends() -> None:
    assert share(GradientNorm(warmup_steps=5), norms(0.0, 1.0)) == 0.0
    assert share(GradientNorm(warmup_steps=5), norms(0.0, 0.0)) == 0.0
    assert share(GradientNorm(warmup_steps=5, gamma=0.0), norms(0.1, 1.0)) == 1.0


def test_higher_odds_only_add_sft_steps() -> None:
    """The random number depends only on the step, so a step that is SFT is also SFT with a higher gradient norm."""
    mu = GradientNorm(warmup_steps=1)
    less, more = (course(mu, 200, memory=norms(latest, 1.0)) for latest in (0.5, 2.0))
    assert all(a <= b for a, b in zip(less, more, strict=True))
    assert less != more


def test_the_draw_is_a_function_of_seed_and_step() -> None:
    mu = GradientNorm(warmup_steps=1)
    memory = norms(1.0, 1.0)
    forwards = course(mu, 64, seed=3, memory=memory)
    backwards = [at(mu, step, seed=3, memory=memory) for step in reversed(range(64))][::-1]
    assert forwards == backwards
    assert forwards != course(mu, 64, seed=4, memory=memory)
    code = (
        "from megatron_chord.schedules import *\nmu = GradientNorm(warmup_steps=1)\n"
        f"print([mu.value(ScheduleInput(step=step, seed=3, memory={memory})) for step in range(64)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert other.stdout.strip() == str(forwards)


def test_neighbouring_seeds_and_steps_draw_independently() -> None:
    mu, memory = GradientNorm(warmup_steps=1), norms(1.0, 1.0)
    draws = [[at(mu, step, seed=seed, memory=memory) for step in range(1, 101)] for seed in range(100)]
    for one, other in ((draws, draws[1:]), ([d[1:] for d in draws], [d[:-1] for d in draws])):
        pairs = [a == b for x, y in zip(one, other, strict=False) for a, b in zip(x, y, strict=False)]
        assert sum(pairs) / len(pairs) == pytest.approx(0.5, abs=0.03)


def test_norms_are_remembered_at_sft_steps_only() -> None:
    mu = GradientNorm(warmup_steps=2)
    memory: Mapping[str, float] = {}
    seen = []
    for step, value, norm in [(0, 1.0, 4.0), (1, 1.0, 3.0), (2, 0.0, 99.0), (3, 1.0, 2.0), (4, 0.0, 98.0)]:
        memory = mu.remember(ScheduleInput(step=step, memory=memory), value, {"grad_norm": norm, "loss": 1.0})
        seen.append(memory)
    assert seen == [norms(4.0, 4.0), norms(3.0, 3.0), norms(3.0, 3.0), norms(2.0, 3.0), norms(2.0, 3.0)]


# Learned


def learn(mu: Learned, step: int, before: float, **measured: float) -> Mapping[str, float]:
    return mu.remember(ScheduleInput(step=step, memory={"mu": before}), before, measured)


def test_learned_starts_with_sft_and_then_its_initial_value() -> None:
    mu = Learned(sft_steps=2, initial=0.4, rate=1.0)
    memory: Mapping[str, float] = {}
    values = []
    for step in range(4):
        now = ScheduleInput(step=step, memory=memory)
        values.append(mu.value(now))
        measured = {"grad_norm": 1.0} if step < 2 else {"entropy": 1.0, "mu_gradient": 0.1}
        memory = mu.remember(now, values[-1], measured)
    assert values == [1.0, 1.0, 0.4, pytest.approx(0.5)]
    assert memory == {"mu": pytest.approx(0.6)}


@pytest.mark.parametrize(
    ("gradient", "entropy", "expected"),
    [
        # 0.5 + 0.1 g + 0.2 (1.5 - H), clipped to [0.1, 0.9].
        (0.0, 1.5, 0.5),
        (1.0, 1.5, 0.6),
        (-1.0, 1.5, 0.4),
        (0.0, 0.5, 0.7),
        (0.0, 2.0, 0.4),
        (2.0, 1.0, 0.8),
        (5.0, 1.0, 0.9),
        (-5.0, 1.5, 0.1),
    ],
)
def test_learned_moves_by_gradient_and_entropy(gradient: float, entropy: float, expected: float) -> None:
    mu = Learned(rate=0.1, entropy_rate=0.2, entropy_target=1.5, low=0.1, high=0.9)
    assert learn(mu, 5, 0.5, entropy=entropy, mu_gradient=gradient) == {"mu": pytest.approx(expected)}


def test_learned_stays_where_nothing_was_measured() -> None:
    mu = Learned(sft_steps=2, rate=0.1)
    assert learn(mu, 5, 0.3) == {"mu": 0.3}
    assert learn(mu, 5, 0.3, mu_gradient=1.0) == {"mu": 0.3}
    assert mu.remember(ScheduleInput(step=1), 1.0, {"entropy": 1.0, "mu_gradient": 1.0}) == {}


def test_learned_asks_for_the_gradient_only_with_a_rate() -> None:
    assert Learned(rate=0.1).needs_mu_gradient
    entropy_only = Learned(entropy_rate=-0.1, entropy_target=1.0)
    assert not entropy_only.needs_mu_gradient
    assert learn(entropy_only, 0, 0.5, entropy=2.0) == {"mu": pytest.approx(0.6)}
    assert not any(mu.needs_mu_gradient for mu in everything() if not isinstance(mu, Learned))
    with pytest.raises(KeyError, match="mu_gradient"):
        learn(Learned(rate=0.1), 0, 0.5, entropy=2.0)


# NoiseAware (GAC)


def noise(rl: float, sft: float, apart: float) -> dict[str, float]:
    return {"advantage_variance": rl, "nll_variance": sft, "disagreement": apart}


def test_noise_aware_moves_by_hand_arithmetic() -> None:
    """mu* = (0.5 x 2 + 3) / (2 + 1 + 3) = 2/3; mu moves a tenth of the way, from 0.5 to 0.5167."""
    mu = NoiseAware(ema=0.9, max_step=1.0, interval=2)
    first = mu.remember(ScheduleInput(step=0), 0.5, noise(3.0, 1.0, 2.0))
    assert first == {"mu": pytest.approx(0.5 + 0.1 / 6), **noise(3.0, 1.0, 2.0)}
    # The second step measures nothing, and mu goes on: 0.9 x 0.51667 + 0.1 x 2/3.
    second = mu.remember(ScheduleInput(step=1, memory=first), first["mu"], {"loss": 1.0})
    assert second == {"mu": pytest.approx(0.9 * (0.5 + 0.1 / 6) + 0.2 / 3), **noise(3.0, 1.0, 2.0)}
    # New numbers are smoothed: 0.9 x 3 + 0.1 x 13 = 4, 0.9 x 1 + 0.1 x 1 = 1, 0.9 x 2 + 0.1 x 2 = 2; mu* = 5/7.
    third = mu.remember(ScheduleInput(step=2, memory=second), 0.6, noise(13.0, 1.0, 2.0))
    assert third == {name: pytest.approx(value) for name, value in noise(4.0, 1.0, 2.0).items()} | {
        "mu": pytest.approx(0.54 + 0.5 / 7)
    }


@pytest.mark.parametrize(
    ("settings", "measured", "expected"),
    [
        # From 0.5, with ema 0: mu is mu* = (0.5 D + sr) / (D + ss + sr), then limited.
        ({}, noise(1.0, 3.0, 0.0), 0.25),
        ({}, noise(1.0, 3.0, 4.0), 0.375),
        ({"target": 0.1}, noise(1.0, 3.0, 4.0), 0.175),
        ({}, noise(0.0, 0.0, 2.0), 0.5),
        ({}, noise(9.0, 0.0, 0.0), 0.9),
        ({}, noise(0.0, 9.0, 0.0), 0.05),
        ({"max_step": 0.01}, noise(9.0, 0.0, 0.0), 0.51),
        ({"max_step": 0.01}, noise(0.0, 9.0, 0.0), 0.49),
        # Half of a prior that is 0.8 at every step.
        ({"prior": WarmupCosine(peak=0.8, valley=0.8)}, noise(1.0, 3.0, 0.0), 0.525),
        ({"prior": WarmupCosine(peak=0.8, valley=0.8), "prior_weight": 0.1}, noise(1.0, 3.0, 0.0), 0.305),
        ({"prior": WarmupCosine(peak=0.8, valley=0.8), "max_step": 0.02}, noise(1.0, 3.0, 0.0), 0.52),
    ],
)
def test_noise_aware_follows_the_noise(settings: Any, measured: dict[str, float], expected: float) -> None:
    mu = NoiseAware(**{"ema": 0.0, "max_step": 1.0, **settings})
    assert mu.remember(ScheduleInput(step=0), 0.5, measured)["mu"] == pytest.approx(expected)


def test_the_prior_is_that_of_the_next_step() -> None:
    prior = WarmupCosine(peak=0.9, valley=0.1, decay_steps=10)
    mu = NoiseAware(ema=0.0, max_step=1.0, prior=prior, prior_weight=1.0)
    after = mu.remember(ScheduleInput(step=3), 0.5, noise(1.0, 1.0, 1.0))
    assert after["mu"] == prior.value(ScheduleInput(step=4))


def test_noise_aware_measures_every_tenth_step_and_stays_before_the_first() -> None:
    mu = NoiseAware()
    assert [step for step in range(25) if mu.measures_noise(step)] == [0, 10, 20]
    assert not any(other.measures_noise(0) for other in everything() if not isinstance(other, NoiseAware))
    assert mu.value(ScheduleInput(step=0)) == 0.5
    assert mu.remember(ScheduleInput(step=0), 0.5, {"loss": 1.0}) == {}


def test_noise_aware_goes_on_after_its_memory_was_json() -> None:
    """A checkpoint holds the memory as JSON. A run that goes on from it has the same mu, bit for bit."""
    mu = NoiseAware(prior=WarmupCosine(peak=0.85, valley=0.15, decay_steps=40))
    straight: Mapping[str, float] = {}
    resumed: Mapping[str, float] = {}
    for step in range(30):
        measured = noise(1 + math.sin(step), 0.3 + 0.1 * math.cos(step), 0.7) if step % 10 == 0 else {}
        now = ScheduleInput(step=step, memory=straight)
        straight = mu.remember(now, mu.value(now), measured)
        now = ScheduleInput(step=step, memory=json.loads(json.dumps(dict(resumed))))
        resumed = mu.remember(now, mu.value(now), measured)
    assert resumed == straight


# All of them


def everything() -> list[MuSchedule]:
    """Many settings of every schedule."""
    ends = (0.0, 0.05, 0.4, 0.9, 1.0)
    shapes = list(itertools.product(ends, ends, (0, 1, 2, 5), (0, 1, 2, 7), (0, 1)))
    decays = [
        kind(peak=peak, valley=valley, warmup_steps=warmup, decay_steps=decay, first_step=first)
        for kind in (WarmupCosine, Linear)
        for peak, valley, warmup, decay, first in shapes
    ]
    return [
        *(Constant(peak=peak) for peak in ends),
        *decays,
        *(Binary(switch_step=step) for step in (0, 1, 5)),
        *(Periodic(sft_steps=a, policy_steps=b) for a in (1, 3) for b in (1, 4)),
        *(RewardAdaptive(tau=tau) for tau in (-0.5, 0.0, 0.5, 1.5)),
        *(GradientNorm(warmup_steps=steps, gamma=gamma) for steps in (1, 4) for gamma in (0.5, 3.0)),
        *(
            Learned(sft_steps=steps, rate=rate, entropy_rate=0.5, entropy_target=1.0, low=low, high=0.8)
            for steps in (0, 3)
            for rate, low in ((0.0, 0.0), (0.3, 0.2))
        ),
        *(
            NoiseAware(ema=0.5, interval=interval, max_step=0.1, prior=prior)
            for interval in (1, 4)
            for prior in (None, WarmupCosine(peak=0.8, valley=0.2, decay_steps=9))
        ),
    ]


def run(mu: Schedule, seed: int, steps: int = 30) -> Iterator[float]:
    """Return mu over a run whose measurements differ at every step."""
    memory: Mapping[str, float] = {}
    for step in range(steps):
        wave = math.sin(1.7 * step + seed)
        now = ScheduleInput(
            step=step, seed=seed, memory=memory, reward_mean=2 * wave if mu.needs_rewards else None
        )
        value = mu.value(now)
        yield value
        measured = {"grad_norm": abs(wave), "entropy": 1 + wave, "mu_gradient": -3 * wave}
        if mu.measures_noise(step):
            measured |= noise(abs(wave), 0.3, 0.1)
        memory = mu.remember(now, value, measured)
        assert all(isinstance(number, float) for number in memory.values())


def test_bounds_hold_and_are_reached() -> None:
    for mu in everything():
        low, high = mu.bounds()
        values = [value for seed in range(4) for value in run(mu, seed)]
        assert 0 <= low <= min(values), mu
        assert max(values) <= high <= 1, mu
        assert (high > 0) == any(value > 0 for value in values), mu
        assert (low < 1) == any(value < 1 for value in values), mu
        assert (low == 0) == any(value == 0 for value in values), mu
        if isinstance(mu, PLAIN):
            assert (low, high) == (min(values), max(values)), mu


def test_fixed_schedules_have_no_state_and_need_no_measurement() -> None:
    for mu in (m for m in everything() if isinstance(m, PLAIN)):
        now = ScheduleInput(step=2, memory={"kept": 1.0})
        assert mu.remember(now, 0.5, {"grad_norm": 1.0, "entropy": 1.0}) == {"kept": 1.0}
        assert mu.known_steps is None
        assert not mu.needs_rewards


def test_known_steps_are_the_same_whatever_is_measured_and_the_next_is_not() -> None:
    for mu in everything():
        known = 30 if mu.known_steps is None else mu.known_steps
        courses = [list(run(mu, seed)) for seed in range(8)]
        assert len({tuple(course[:known]) for course in courses}) == 1, mu
        assert known == 30 or len({course[known] for course in courses}) > 1, mu


def test_steps_where_a_schedule_changes_direction() -> None:
    assert Constant().turns(9) == ()
    assert Binary(switch_step=3).turns(9) == [3]
    assert Linear(peak=1, valley=0, warmup_steps=2, decay_steps=4, first_step=1).turns(9) == [1, 5]
    assert Periodic(sft_steps=1, policy_steps=2).turns(6) == [0, 1, 3, 4]
    assert GradientNorm(warmup_steps=4).turns(9) == [4]
    assert Learned(sft_steps=4, rate=1.0).turns(9) == [4, 5]


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (Constant, {"peak": 1.1}, "mu.peak"),
        (Constant, {"peak": math.nan}, "mu.peak"),
        (WarmupCosine, {"peak": -0.1, "valley": 0.0}, "mu.peak"),
        (Linear, {"peak": 0.1, "valley": 2.0}, "mu.valley"),
        (WarmupCosine, {"peak": 0.1, "valley": 0.0, "warmup_steps": -1}, "mu.warmup_steps"),
        (Linear, {"peak": 0.1, "valley": 0.0, "decay_steps": -1}, "mu.decay_steps"),
        (WarmupCosine, {"peak": 0.1, "valley": 0.0, "first_step": 2}, "mu.first_step"),
        (Binary, {"switch_step": -1}, "mu.switch_step"),
        (Periodic, {"sft_steps": 0}, "mu.sft_steps"),
        (Periodic, {"policy_steps": -1}, "mu.policy_steps"),
        (RewardAdaptive, {"tau": math.inf}, "mu.tau"),
        (GradientNorm, {"warmup_steps": 0}, "mu.warmup_steps"),
        (GradientNorm, {"warmup_steps": -2}, "mu.warmup_steps"),
        (GradientNorm, {"warmup_steps": 1, "gamma": -1.0}, "mu.gamma"),
        (GradientNorm, {"warmup_steps": 1, "gamma": math.nan}, "mu.gamma"),
        (Learned, {}, "mu.rate"),
        (Learned, {"rate": -1.0}, "mu.rate"),
        (Learned, {"rate": math.nan}, "mu.rate"),
        (Learned, {"rate": 1.0, "sft_steps": -1}, "mu.sft_steps"),
        (Learned, {"rate": 1.0, "initial": 0.01}, "mu.initial"),
        (Learned, {"rate": 1.0, "initial": 1.5}, "mu.initial"),
        (Learned, {"rate": 1.0, "low": 0.9, "high": 0.1}, "mu.initial"),
        (Learned, {"rate": 1.0, "low": 0.0}, "mu.low"),
        (Learned, {"rate": 1.0, "high": 1.0}, "mu.high"),
        (NoiseAware, {"low": 0.0}, "mu.low"),
        (NoiseAware, {"high": 1.0}, "mu.high"),
        (NoiseAware, {"initial": 0.95}, "mu.initial"),
        (NoiseAware, {"target": 1.5}, "mu.target"),
        (Learned, {"entropy_rate": 1.0}, "mu.entropy_target"),
        (Learned, {"entropy_rate": math.inf, "entropy_target": 1.0}, "mu.entropy_rate"),
    ],
)
def test_what_is_refused_is_named(kind: type[Schedule], settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^method.{name.replace('.', '[.]')}\b"):
        kind(**settings)
