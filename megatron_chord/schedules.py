"""Schedules of mu, the weight of the SFT branch: mu is a function of the step and of earlier measurements.

Every schedule is one frozen dataclass. Its fields are the settings of the YAML block ``method.mu``; its method
``value`` returns mu. The first step is step 0. Some schedules keep numbers between steps. These are a flat dictionary,
equal on all ranks and saved in checkpoints. Random choices depend only on (seed, step), so there is no random state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Memory = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ScheduleInput:
    """Everything that mu may depend on."""

    step: int
    """Number of the step; the first is 0."""
    seed: int = 0
    """Seed of the run."""
    memory: Memory = field(default_factory=dict[str, float])
    """What `remember` returned after the previous step; empty before the first step."""
    reward_mean: float | None = None
    """Mean reward of this step's rollouts; None before they are sampled."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of the schedules. Its defaults describe a schedule that keeps nothing and needs no rewards."""

    def value(self, now: ScheduleInput) -> float:
        """mu of one step, in [0, 1]."""
        raise NotImplementedError

    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value that mu can have in a run."""
        raise NotImplementedError

    @property
    def needs_rewards(self) -> bool:
        """True if ``value`` needs ``reward_mean``. Every step then samples, and mu is known only after sampling."""
        return False

    @property
    def needs_last_step(self) -> bool:
        """True if ``value`` depends on measurements of the previous step. mu is then known only after that step."""
        return False

    @property
    def needs_mu_gradient(self) -> bool:
        """True if ``remember`` reads ``measured["mu_gradient"]``. The trainer then computes it."""
        return False

    def measures_noise(self, step: int) -> bool:
        """True if ``remember`` reads the noise of this step (``losses.noise``). The trainer then measures it."""
        return False

    @property
    def known_steps(self) -> int | None:
        """How many steps, from the first on, have a mu that is known before the run. None: all steps."""
        return None

    def turns(self, steps: int) -> Sequence[int]:
        """Steps at which mu begins to follow another rule, in ascending order.

        Args:
            steps: number of steps of the run. The result may also contain steps outside the run.
        """
        return ()

    def remember(self, now: ScheduleInput, mu: float, measured: Mapping[str, float]) -> Memory:
        """The memory after a step that used ``mu``. ``measured`` is the metrics row of the step."""
        return now.memory

    def resets_optimizer(self, step: int) -> bool:
        """True if Adam's moments and the learning-rate schedule are reset before this step."""
        return False


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """mu is ``peak`` at every step (CHORD-phi: 0.1). ``mu: 0.5`` is short for this block with ``peak: 0.5``."""

    NUMBER = "peak"

    schedule: Literal["constant"] = "constant"
    peak: float = 0.1
    """mu of every step, in [0, 1]."""

    def __post_init__(self) -> None:
        _in_unit_interval(peak=self.peak)

    def value(self, now: ScheduleInput) -> float:
        return self.peak

    def bounds(self) -> tuple[float, float]:
        return self.peak, self.peak


@dataclass(frozen=True, kw_only=True)
class _Decay(Schedule):
    """mu rises linearly from 0 to ``peak``, falls to ``valley`` and stays there."""

    peak: float
    """mu at the end of the warm-up, in [0, 1]."""
    valley: float
    """mu at the end of the fall, in [0, 1]."""
    warmup_steps: int = 0
    """Number of steps in which mu rises."""
    decay_steps: int = 0
    """Number of steps in which mu falls."""
    first_step: int = 0
    """Number that the schedule gives to the run's first step. 0: as in ms-swift; without warm-up the first step uses
    ``peak`` itself. 1: as in Trinity-RFT."""

    def __post_init__(self) -> None:
        _in_unit_interval(peak=self.peak, valley=self.valley)
        _counts(warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)
        if self.first_step not in (0, 1):
            raise ValueError(f"method.mu.first_step must be 0 or 1, got {self.first_step}")

    def value(self, now: ScheduleInput) -> float:
        step = now.step + self.first_step
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if step >= self.warmup_steps + self.decay_steps:
            return self.valley
        return self.valley + (self.peak - self.valley) * self._left(
            (step - self.warmup_steps) / self.decay_steps
        )

    def bounds(self) -> tuple[float, float]:
        # mu is monotone between these steps: the first, the last of the warm-up, the first and the last of the fall.
        ends = (0, self.warmup_steps - 1, self.warmup_steps, self.warmup_steps + self.decay_steps)
        values = [self.value(ScheduleInput(step=max(end - self.first_step, 0))) for end in ends]
        return min(values), max(values)

    def turns(self, steps: int) -> Sequence[int]:
        return [end - self.first_step for end in (self.warmup_steps, self.warmup_steps + self.decay_steps)]

    def _left(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(_Decay):
    """The fall is a half cosine, as in Trinity-RFT and ms-swift (CHORD-mu: from 0.9 to 0.05 in 200 steps)."""

    schedule: Literal["warmup_cosine"] = "warmup_cosine"

    def _left(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Linear(_Decay):
    """The fall is a straight line."""

    schedule: Literal["linear"] = "linear"

    def _left(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True, kw_only=True)
class Binary(Schedule):
    """SFT first, then RL: mu is 1 in the first ``switch_step`` steps and 0 afterwards."""

    schedule: Literal["binary"] = "binary"
    switch_step: int
    """Number of SFT steps before RL starts."""
    reset_optimizer: bool = False
    """Resets Adam's moments and starts the learning-rate warm-up again when RL starts, as two separate runs do."""

    def __post_init__(self) -> None:
        _counts(switch_step=self.switch_step)

    def value(self, now: ScheduleInput) -> float:
        return 1.0 if now.step < self.switch_step else 0.0

    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0 if self.switch_step else 0.0

    def turns(self, steps: int) -> Sequence[int]:
        return [self.switch_step]

    def resets_optimizer(self, step: int) -> bool:
        return self.reset_optimizer and step == self.switch_step > 0


@dataclass(frozen=True, kw_only=True)
class Periodic(Schedule):
    """SFT and RL alternate: ``sft_steps`` steps of SFT (mu 1), ``policy_steps`` steps of RL (mu 0), and so on."""

    schedule: Literal["periodic"] = "periodic"
    sft_steps: int = 1
    """Number of SFT steps in a row."""
    policy_steps: int = 1
    """Number of RL steps in a row."""

    def __post_init__(self) -> None:
        _counts(sft_steps=self.sft_steps, policy_steps=self.policy_steps)
        if 0 in (self.sft_steps, self.policy_steps):
            raise ValueError(
                "method.mu.sft_steps and method.mu.policy_steps must be > 0; for SFT or RL only, use a constant mu"
            )

    def value(self, now: ScheduleInput) -> float:
        return 1.0 if now.step % (self.sft_steps + self.policy_steps) < self.sft_steps else 0.0

    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def turns(self, steps: int) -> Sequence[int]:
        starts = range(0, steps, self.sft_steps + self.policy_steps)
        return [turn for start in starts for turn in (start, start + self.sft_steps)]


@dataclass(frozen=True, kw_only=True)
class RewardAdaptive(Schedule):
    """mu is ``tau`` minus the mean reward of this step's rollouts, clamped to [0, 1] (CHORD, App. B.1: tau 0.5).

    The paper does not say whether it smooths the mean. Here it is the mean of one step. The paper has no upper limit
    either; the limit of 1 matters only for rewards below 0.
    """

    schedule: Literal["reward_adaptive"] = "reward_adaptive"
    tau: float = 0.5
    """Mean reward at which mu reaches 0."""

    def __post_init__(self) -> None:
        _finite(tau=self.tau)

    def value(self, now: ScheduleInput) -> float:
        if now.reward_mean is None:
            raise ValueError("a reward-adaptive mu needs the step's rewards")
        return min(max(self.tau - now.reward_mean, 0.0), 1.0)

    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def needs_rewards(self) -> bool:
        return True

    @property
    def known_steps(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Schedule):
    """SASR (arXiv 2505.13026): each step is SFT or RL at random; the probability depends on the SFT gradient norm.

    The first ``warmup_steps`` steps are SFT. Every later step is SFT with probability G / (G + ``gamma`` G0). G0 is the
    gradient norm before clipping (``grad_norm``) of the last warm-up step; G is that of the latest SFT step. We do not
    know the paper's values of ``gamma`` and ``warmup_steps``.
    """

    schedule: Literal["gradient_norm"] = "gradient_norm"
    warmup_steps: int
    """Number of SFT steps at the start of the run."""
    gamma: float = 1.0
    """Factor of G0 in the probability. A larger one makes SFT steps rarer."""

    def __post_init__(self) -> None:
        _counts(warmup_steps=self.warmup_steps)
        if self.warmup_steps == 0:
            raise ValueError(
                "method.mu.warmup_steps must be > 0: the schedule needs the gradient norm of a warm-up step"
            )
        _finite(gamma=self.gamma)
        if self.gamma < 0:
            raise ValueError(f"method.mu.gamma must be >= 0, got {self.gamma}")

    def value(self, now: ScheduleInput) -> float:
        if now.step < self.warmup_steps:
            return 1.0
        latest, warm = now.memory["sft_grad_norm"], now.memory["warm_grad_norm"]
        odds = latest / max(latest + self.gamma * warm, 1e-30)
        return 1.0 if _draw(now.seed, now.step) < odds else 0.0

    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def needs_last_step(self) -> bool:
        return True

    @property
    def known_steps(self) -> int:
        return self.warmup_steps

    def turns(self, steps: int) -> Sequence[int]:
        return [self.warmup_steps]

    def remember(self, now: ScheduleInput, mu: float, measured: Mapping[str, float]) -> Memory:
        if mu != 1.0:
            return now.memory
        norm = measured["grad_norm"]
        warm = {"warm_grad_norm": norm} if now.step < self.warmup_steps else {}
        return {**now.memory, "sft_grad_norm": norm, **warm}


@dataclass(frozen=True, kw_only=True)
class Learned(Schedule):
    """AMFT (arXiv 2508.06944), experimental: mu is learned from a utility and from the policy's entropy.

    mu is 1 in the first ``sft_steps`` steps, then ``initial``. After every later step
    mu <- clip(mu + ``rate`` g + ``entropy_rate`` (``entropy_target`` - H), ``low``, ``high``). H is the entropy of the
    policy at rollout tokens in that step (metric ``entropy``). g is the derivative of the utility by mu (metric
    ``mu_gradient``).

    The formula is that of the authors' code (TSYJ-He/AMFT), where g has another sign and scale (docs/methods.md, note
    9). ``rate`` and ``entropy_rate`` are 0 (off) by default. A summary of the paper says that high entropy should raise
    mu, which contradicts the formula; a negative ``entropy_rate`` does that. The third version of the paper was
    withdrawn at the authors' request during an inquiry, so its results are not reliable.
    """

    schedule: Literal["learned"] = "learned"
    sft_steps: int = 0
    """Number of SFT steps at the start of the run."""
    initial: float = 0.5
    """mu of the first step after the SFT steps."""
    rate: float = 0.0
    """Step size of the utility's gradient. 0: off."""
    entropy_rate: float = 0.0
    """Step size of the entropy term. 0: off."""
    entropy_target: float = 0.0
    """Target of the entropy, in nats per token. Required with `entropy_rate`."""
    low: float = 0.05
    """Smallest mu. It must be above 0 if `rate` is: a step without SFT has no gradient by mu."""
    high: float = 0.95
    """Largest mu. It must be below 1: a step with mu = 1 samples nothing, so mu would never change again."""

    def __post_init__(self) -> None:
        _counts(sft_steps=self.sft_steps)
        _check_moving_mu(
            initial=self.initial,
            low=self.low,
            high=self.high,
            low_is_positive_for="method.mu.rate" if self.rate else None,
        )
        _finite(rate=self.rate, entropy_rate=self.entropy_rate, entropy_target=self.entropy_target)
        if self.rate < 0:
            raise ValueError(f"method.mu.rate must be >= 0, got {self.rate}")
        if self.rate == self.entropy_rate == 0:
            raise ValueError(
                "method.mu.rate and method.mu.entropy_rate are both 0: nothing is learned; use a constant mu"
            )
        if self.entropy_rate and self.entropy_target <= 0:
            raise ValueError(
                f"method.mu.entropy_target must be > 0 with method.mu.entropy_rate, got {self.entropy_target}"
            )

    def value(self, now: ScheduleInput) -> float:
        return 1.0 if now.step < self.sft_steps else now.memory.get("mu", self.initial)

    def bounds(self) -> tuple[float, float]:
        return self.low, 1.0 if self.sft_steps else self.high

    @property
    def needs_last_step(self) -> bool:
        return True

    @property
    def needs_mu_gradient(self) -> bool:
        return self.rate != 0

    @property
    def known_steps(self) -> int:
        return self.sft_steps + 1

    def turns(self, steps: int) -> Sequence[int]:
        return [self.sft_steps, self.sft_steps + 1]

    def remember(self, now: ScheduleInput, mu: float, measured: Mapping[str, float]) -> Memory:
        if now.step < self.sft_steps or "entropy" not in measured:
            return now.memory
        climb = self.rate * measured["mu_gradient"] if self.needs_mu_gradient else 0.0
        steer = self.entropy_rate * (self.entropy_target - measured["entropy"])
        return {**now.memory, "mu": min(max(mu + climb + steer, self.low), self.high)}


@dataclass(frozen=True, kw_only=True)
class NoiseAware(Schedule):
    """GAC (arXiv 2605.26184): mu follows the noise of the two branches and their disagreement.

    In every ``interval``-th step the variance sr of the advantages, the variance ss of the demonstrations' mean NLL and
    the disagreement D are measured (metrics ``advantage_variance``, ``nll_variance``, ``disagreement``) and smoothed.
    The weight with the least mean squared error is (``target`` D + sr) / (D + ss + sr). After every step mu moves
    towards it by the share 1 - ``ema``, and towards ``prior``, by at most ``max_step``.
    """

    schedule: Literal["noise_aware"] = "noise_aware"
    initial: float = 0.5
    """mu of the first step."""
    target: float = 0.5
    """mu where the branches disagree and have no noise (alpha in the paper)."""
    ema: float = 0.99
    """Share of the old value in a moving average, in [0, 1). It is used for each measurement and for mu."""
    interval: int = 10
    """Number of steps between two measurements of the noise. The first step is measured."""
    max_step: float = 0.01
    """Largest change of mu from one step to the next."""
    trim: float = 0.1
    """Share of the demonstrations that ss leaves out at each end, in [0, 0.5)."""
    low: float = 0.05
    """Smallest mu. It must be above 0: a step without demonstrations measures no noise."""
    high: float = 0.9
    """Largest mu. It must be below 1: a step without rollouts measures no noise."""
    prior: WarmupCosine | None = None
    """A cosine schedule towards which mu moves. Default: none."""
    prior_weight: float = 0.5
    """Share of `prior` in mu before its change is limited (1 - lambda in the paper)."""

    def __post_init__(self) -> None:
        _check_moving_mu(
            initial=self.initial,
            low=self.low,
            high=self.high,
            low_is_positive_for="method.mu.schedule noise_aware",
        )
        _in_unit_interval(target=self.target, max_step=self.max_step, prior_weight=self.prior_weight)
        if not 0 <= self.ema < 1:
            raise ValueError(f"method.mu.ema must lie in [0, 1), got {self.ema}")
        if self.interval < 1:
            raise ValueError(f"method.mu.interval must be >= 1, got {self.interval}")
        if self.max_step == 0:
            raise ValueError("method.mu.max_step must be > 0: mu would never change; use a constant mu")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"method.mu.trim must lie in [0, 0.5), got {self.trim}")

    def value(self, now: ScheduleInput) -> float:
        return now.memory.get("mu", self.initial)

    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def needs_last_step(self) -> bool:
        return True

    def measures_noise(self, step: int) -> bool:
        return step % self.interval == 0

    @property
    def known_steps(self) -> int:
        return 1

    def turns(self, steps: int) -> Sequence[int]:
        return [1]

    def remember(self, now: ScheduleInput, mu: float, measured: Mapping[str, float]) -> Memory:
        smooth = {name: now.memory[name] for name in NOISE if name in now.memory}
        if all(name in measured for name in NOISE):
            smooth = {name: self._smoothed(smooth.get(name), measured[name]) for name in NOISE}
        if not smooth:
            return now.memory
        rl_noise, sft_noise, apart = (smooth[name] for name in NOISE)
        best = (self.target * apart + rl_noise) / max(apart + sft_noise + rl_noise, 1e-8)
        wanted = self._clipped(self._smoothed(mu, best))
        if self.prior is not None:
            after = self.prior.value(ScheduleInput(step=now.step + 1))
            wanted = self.prior_weight * after + (1 - self.prior_weight) * wanted
        wanted = min(max(wanted, mu - self.max_step), mu + self.max_step)
        return {"mu": self._clipped(wanted), **smooth}

    def _smoothed(self, before: float | None, new: float) -> float:
        return new if before is None else self.ema * before + (1 - self.ema) * new

    def _clipped(self, mu: float) -> float:
        return min(max(mu, self.low), self.high)


NOISE = ("advantage_variance", "nll_variance", "disagreement")
"""The metrics that `NoiseAware` reads."""

MuSchedule = (
    Constant
    | WarmupCosine
    | Linear
    | Binary
    | Periodic
    | RewardAdaptive
    | GradientNorm
    | Learned
    | NoiseAware
)


def _draw(seed: int, step: int) -> float:
    """A pseudo-random number in [0, 1) that depends only on seed and step: equal on all ranks and after a resume."""
    digest = hashlib.blake2b(f"mu/{seed}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _in_unit_interval(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"method.mu.{name} must lie in [0, 1], got {value}")


def _check_moving_mu(
    *, initial: float, low: float, high: float, low_is_positive_for: str | None = None
) -> None:
    """Check the range of a schedule that moves mu from what each step measures.

    ``low_is_positive_for`` names the setting that measures demonstrations in every step; None: there is none.
    """
    _in_unit_interval(initial=initial, low=low, high=high)
    if high == 1:
        raise ValueError(
            "method.mu.high must be < 1: a step with mu 1 samples no rollouts, so mu would never change again"
        )
    if low == 0 and low_is_positive_for is not None:
        raise ValueError(
            f"method.mu.low must be > 0 with {low_is_positive_for}: a step with mu 0 has no SFT loss, so mu could not "
            "be measured"
        )
    if not low <= initial <= high:
        raise ValueError(f"method.mu.initial must lie in [low, high] = [{low}, {high}], got {initial}")


def _counts(**values: int) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"method.mu.{name} must be >= 0, got {value}")


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"method.mu.{name} must be a finite number, got {value}")
