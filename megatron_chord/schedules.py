"""mu, the weight of the SFT branch: a plain function of the step and of what the run has measured so far.

Every schedule is one frozen dataclass: its fields are the YAML block ``method.mu``, ``value`` is mu. A step is
counted from 0. What a schedule must remember between steps is a flat dictionary of numbers, kept equal on all ranks
and saved in checkpoints; random choices are functions of (seed, step), so there is no random state to keep.
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
    """All that mu may depend on."""

    step: int
    """Optimizer step, the first is 0."""
    seed: int = 0
    """The run's."""
    memory: Memory = field(default_factory=dict[str, float])
    """What `remember` returned after the step before; empty before the first."""
    reward_mean: float | None = None
    """Of this step's rollouts; None before they are there."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of the schedules: one without memory that needs no rewards."""

    def value(self, now: ScheduleInput) -> float:
        """mu in [0, 1]."""
        raise NotImplementedError

    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value that mu can take in a run."""
        raise NotImplementedError

    @property
    def needs_rewards(self) -> bool:
        """mu is known only after sampling: ``value`` is called with ``reward_mean``, and every step samples."""
        return False

    @property
    def needs_last_step(self) -> bool:
        """``value`` depends on what the step before measured, so it is not known before that step has trained."""
        return False

    @property
    def needs_mu_gradient(self) -> bool:
        """``remember`` reads ``measured["mu_gradient"]``, which the trainer must then compute."""
        return False

    @property
    def known_steps(self) -> int | None:
        """At so many first steps mu is known before the run; None: at all."""
        return None

    def turns(self, steps: int) -> Sequence[int]:
        """The steps of a run of ``steps`` at which mu begins to follow another rule, in order; may hold others."""
        return ()

    def remember(self, now: ScheduleInput, mu: float, measured: Mapping[str, float]) -> Memory:
        """The memory after a step that used ``mu`` and ``measured`` these numbers (its metrics row)."""
        return now.memory

    def resets_optimizer(self, step: int) -> bool:
        """Adam's moments and the learning-rate schedule start anew before this step."""
        return False


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """``peak`` at every step (CHORD-phi: 0.1). A number in place of the block is this schedule: ``mu: 0.5``."""

    NUMBER = "peak"

    schedule: Literal["constant"] = "constant"
    peak: float = 0.1
    """mu, in [0, 1]."""

    def __post_init__(self) -> None:
        _in_unit_interval(peak=self.peak)

    def value(self, now: ScheduleInput) -> float:
        return self.peak

    def bounds(self) -> tuple[float, float]:
        return self.peak, self.peak


@dataclass(frozen=True, kw_only=True)
class _Decay(Schedule):
    """A linear rise from 0 to ``peak``, a fall to ``valley``, then ``valley``."""

    peak: float
    """Highest mu, after the warm-up."""
    valley: float
    """mu after the fall."""
    warmup_steps: int = 0
    """Steps of the rise."""
    decay_steps: int = 0
    """Steps of the fall."""
    first_step: int = 0
    """What the schedule calls the run's first step: 0 (ms-swift: without warm-up it uses ``peak`` itself) or 1
    (Trinity-RFT)."""

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
        # Monotone between these: the first step, the last of the warm-up, the first and the last of the fall.
        ends = (0, self.warmup_steps - 1, self.warmup_steps, self.warmup_steps + self.decay_steps)
        values = [self.value(ScheduleInput(step=max(end - self.first_step, 0))) for end in ends]
        return min(values), max(values)

    def turns(self, steps: int) -> Sequence[int]:
        return [end - self.first_step for end in (self.warmup_steps, self.warmup_steps + self.decay_steps)]

    def _left(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(_Decay):
    """The fall is a half cosine (CHORD-mu: 0.9 -> 0.05 in 200 steps); the schedule of Trinity-RFT and ms-swift."""

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
    """SFT, then RL: mu is 1 for the first ``switch_step`` steps and 0 afterwards."""

    schedule: Literal["binary"] = "binary"
    switch_step: int
    """First step of RL."""
    reset_optimizer: bool = False
    """Start the second stage with fresh Adam moments and its own learning-rate warm-up, as two separate runs do."""

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
    """Alternating: ``sft_steps`` steps of SFT (mu 1), then ``policy_steps`` of RL (mu 0), and again."""

    schedule: Literal["periodic"] = "periodic"
    sft_steps: int = 1
    """Steps of SFT in a row."""
    policy_steps: int = 1
    """Steps of RL in a row."""

    def __post_init__(self) -> None:
        _counts(sft_steps=self.sft_steps, policy_steps=self.policy_steps)
        if 0 in (self.sft_steps, self.policy_steps):
            raise ValueError(
                "method.mu.sft_steps and method.mu.policy_steps must be > 0; for one alone use a constant mu"
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
    """max(0, ``tau`` - mean reward of this step's rollouts), at most 1 (CHORD, App. B.1: tau 0.5).

    The paper does not say whether it smooths the mean; here it is that of one step. Nor does it say "at most 1", which
    matters for rewards below 0.
    """

    schedule: Literal["reward_adaptive"] = "reward_adaptive"
    tau: float = 0.5
    """Mean reward from which on mu is 0."""

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
    """SASR (arXiv 2505.13026): steps are SFT or RL, by a draw whose odds follow the SFT gradient norm.

    ``warmup_steps`` of SFT; G0 is the norm (``grad_norm``, before clipping) of the last of them, G that of the last SFT
    step. A later step is SFT with probability G / (G + ``gamma`` G0). The paper's ``gamma`` and ``warmup_steps`` are
    not known to us.
    """

    schedule: Literal["gradient_norm"] = "gradient_norm"
    warmup_steps: int
    """Steps of SFT at the beginning."""
    gamma: float = 1.0
    """The larger it is, the fewer steps are SFT."""

    def __post_init__(self) -> None:
        _counts(warmup_steps=self.warmup_steps)
        if self.warmup_steps == 0:
            raise ValueError(
                "method.mu.warmup_steps must be > 0: the draw compares with the warm-up's gradient norm"
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
    """AMFT (arXiv 2508.06944), experimental: mu climbs the gradient of a utility and steers the policy's entropy.

    ``sft_steps`` of mu = 1, then ``initial``, and after every step
    mu <- clip(mu + ``rate`` g + ``entropy_rate`` (``entropy_target`` - H), ``low``, ``high``), where H is that step's
    entropy on rollout tokens (``entropy``) and g the change of the utility with mu (``mu_gradient``).

    Open: we know this formula from a digest alone, and none of its constants, so ``rate`` and ``entropy_rate`` are 0
    (off) until given. The digest also says that high entropy should raise mu, against the sign of its own formula,
    which is ours; a negative ``entropy_rate`` turns it round. The paper's third version was withdrawn at the authors'
    request pending an inquiry, so its results are no evidence.
    """

    schedule: Literal["learned"] = "learned"
    sft_steps: int = 0
    """Steps of SFT at the beginning."""
    initial: float = 0.5
    """First mu after them."""
    rate: float = 0.0
    """Step size along the utility's gradient; 0: off."""
    entropy_rate: float = 0.0
    """Step size of the entropy's part; 0: off."""
    entropy_target: float = 0.0
    """Nats per token; must be given with `entropy_rate`."""
    low: float = 0.05
    """Above 0 where `rate` is: without an SFT pass there is no gradient to climb."""
    high: float = 0.95
    """Below 1: a step of mu = 1 samples nothing, so mu would stay there for ever."""

    def __post_init__(self) -> None:
        _counts(sft_steps=self.sft_steps)
        _in_unit_interval(initial=self.initial, low=self.low, high=self.high)
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
        if self.high == 1:
            raise ValueError(
                "method.mu.high must be < 1: without rollouts nothing is measured, and mu would stay at 1"
            )
        if self.rate and self.low == 0:
            raise ValueError(
                "method.mu.low must be > 0 with method.mu.rate: without an SFT pass mu has no gradient"
            )
        if not self.low <= self.initial <= self.high:
            raise ValueError(
                f"method.mu.initial must lie in [low, high] = [{self.low}, {self.high}], got {self.initial}"
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


MuSchedule = Constant | WarmupCosine | Linear | Binary | Periodic | RewardAdaptive | GradientNorm | Learned


def _draw(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing but seed and step: equal on all ranks, and after a resume."""
    digest = hashlib.blake2b(f"mu/{seed}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _in_unit_interval(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"method.mu.{name} must lie in [0, 1], got {value}")


def _counts(**values: int) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"method.mu.{name} must be >= 0, got {value}")


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"method.mu.{name} must be a finite number, got {value}")
