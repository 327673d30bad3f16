"""Warnings about a run's numbers: pure functions over the rows of metrics.jsonl.

Each check says what it found, why that matters and which settings to look at. It warns once in a run.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_chord.settings_tree import setting

Row = Mapping[str, Any]
Settings = Mapping[str, Any]
_FIRST, _RECENT = 10, 60
"""Numbers of rows that the checks get: first rows and last rows."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    """Name of the check."""
    step: int
    """Number of finished training steps when the problem was found."""
    saw: str
    why: str
    look_at: tuple[str, ...]
    """Names of settings."""

    def __str__(self) -> str:
        return f"warning: {self.saw}. {self.why} Look at {', '.join(self.look_at)}."


@dataclass(frozen=True, kw_only=True)
class History:
    first: Sequence[Row]
    """The run's first rows, up to ``_FIRST``."""
    recent: Sequence[Row]
    """The last rows, up to ``_RECENT``; the newest is last."""

    @property
    def now(self) -> Row:
        return self.recent[-1]


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    see: Callable[[History, Settings], str | None]
    """The check's finding; None if nothing is wrong."""
    why: str
    look_at: tuple[str, ...]


@dataclass(kw_only=True)
class Judge:
    """Gets the rows of a run one after the other, and returns the new findings of each."""

    settings: Settings
    """The settings of the run, as in config.yaml."""
    _first: list[Row] = field(default_factory=list[Row])
    _recent: deque[Row] = field(default_factory=lambda: deque[Row](maxlen=_RECENT))
    _said: set[str] = field(default_factory=set[str])

    def add(self, row: Row) -> list[Finding]:
        """The findings of the step of ``row`` that no earlier step had."""
        if len(self._first) < _FIRST:
            self._first.append(row)
        self._recent.append(row)
        history = History(first=self._first, recent=list(self._recent))
        found = [
            Finding(name=check.name, step=row["step"] + 1, saw=saw, why=check.why, look_at=check.look_at)
            for check in CHECKS
            if check.name not in self._said and (saw := check.see(history, self.settings)) is not None
        ]
        self._said |= {finding.name for finding in found}
        return found


def judge(rows: Sequence[Row], settings: Settings) -> list[Finding]:
    """All findings of a run, in the order in which they were seen. ``rows``: of training steps."""
    one = Judge(settings=settings)
    return [finding for row in rows for finding in one.add(row)]


# ---- the checks


def _truncated(history: History, settings: Settings) -> str | None:
    limit = setting(settings, "data.max_response_tokens", "the limit of")
    now = history.now.get("truncated_fraction", 0.0)
    if now > 0.99:
        return f"all answers of the step were cut off at {limit} tokens"
    mean = _mean(history.recent, "truncated_fraction", last=5)
    if mean is not None and mean >= 0.5:
        return f"{100 * mean:.0f} % of the answers of the last 5 steps were cut off at {limit} tokens"
    return None


def _equal_groups(history: History, settings: Settings) -> str | None:
    mean = _mean(history.recent, "equal_reward_groups", last=3)
    if mean is None or mean < 0.999:
        return None
    reward = _mean(history.recent, "reward_mean", last=3)
    height = "" if reward is None else f" (mean reward {reward:.3g})"
    return f"in the last 3 steps all answers to a prompt had the same reward, for every prompt{height}"


def _zero_gradient(history: History, settings: Settings) -> str | None:
    row = history.now
    share = row.get("zero_gradient", 0.0)
    tokens = sum(value for name, value in row.items() if name.startswith("num_") and name.endswith("_tokens"))
    is_explained = row.get("equal_reward_groups", 0.0) > 0.999 and not row.get("mu")
    if share == 0 or tokens == 0 or is_explained:
        return None
    return f"the gradient of {100 * share:.0f} % of the step's updates was exactly 0, with {tokens} trained tokens"


def _entropy_collapse(history: History, settings: Settings) -> str | None:
    if len(history.recent) < 15:
        return None
    before, now = _mean(history.first, "entropy", first=5), _mean(history.recent, "entropy", last=5)
    if before is None or now is None or now >= 0.1 * before or _has_gained(history):
        return None
    return f"the entropy fell from {before:.3g} to {now:.3g} nats a token, and the reward did not rise"


def _entropy_spike(history: History, settings: Settings) -> str | None:
    earlier = [row["entropy"] for row in history.recent[:-3] if "entropy" in row]
    now = _mean(history.recent, "entropy", last=3)
    if len(earlier) < 10 or now is None:
        return None
    usual = statistics.median(earlier)
    if now < 3 * usual or now < usual + 0.5:
        return None
    return f"the entropy rose to {now:.3g} nats a token; it had been about {usual:.3g}"


def _failed_gradings(history: History, settings: Settings) -> str | None:
    row = history.now
    if row.get("reward_mean") != 0 or not row.get("grader_errors"):
        return None
    return f"every graded answer of the step has the reward 0, and {row['grader_errors']} gradings failed"


def _length_drift(history: History, settings: Settings) -> str | None:
    if len(history.recent) < 40:
        return None
    then, last = history.recent[-40:-30], history.recent[-10:]
    before, now = _mean(then, "response_length"), _mean(last, "response_length")
    if not before or now is None or 0.5 < now / before < 2:
        return None
    earlier, reward = _mean(then, "reward_mean"), _mean(last, "reward_mean")
    if earlier is None or reward is None or reward > earlier + 0.02:
        return None
    return (
        f"within 30 steps the answers went from {before:.0f} to {now:.0f} tokens, and the mean reward from "
        f"{earlier:.3g} to {reward:.3g}"
    )


def _gap_trend(history: History, settings: Settings) -> str | None:
    if len(history.recent) < 20:
        return None
    before, now = _mean(history.first, "logprob_gap"), _mean(history.recent, "logprob_gap", last=10)
    if before is None or now is None or now < 1e-3 or now < 3 * before:
        return None
    return f"the log-prob gap between trainer and vLLM grew from {before:.2g} to {now:.2g} nats"


def _temperatures(history: History, settings: Settings) -> str | None:
    rollout = setting(settings, "rollout.temperature", 1.0)
    sft = setting(settings, "method.sft_temperature", 1.0)
    mu = history.now.get("mu", 0.0)
    if mu <= 0 or rollout == sft:
        return None
    return f"mu is {mu:.3g}, answers are sampled at temperature {rollout:g}, the SFT loss has temperature {sft:g}"


def _used_up(history: History, settings: Settings) -> str | None:
    times = int(history.now.get("demonstration_epochs", 0.0))
    if times < 5 or history.now.get("mu") == 0:
        return None
    p = history.now.get("sft_p")
    fit = "" if p is None else f", and their tokens have a mean probability of {p:.2f}"
    return f"all demonstrations have been used {times} times{fit}"


def _idle(history: History, settings: Settings) -> str | None:
    """Checks only runs whose ranks and servers have separate hardware, or work at the same time."""
    seconds = [row["seconds"] for row in history.recent[-10:] if "sample" in row.get("seconds", {})]
    total = sum(one["total"] for one in seconds)
    if len(seconds) < 10 or total <= 0:
        return None
    collect, train, sample = (
        sum(one.get(name, 0.0) for one in seconds) / total for name in ("collect", "train", "sample")
    )
    if setting(settings, "rollout.asynchronous") is not None:
        if collect > 0.5:
            return f"the ranks waited for answers in {100 * collect:.0f} % of the last 10 steps' time"
        if sample < 0.5:
            return f"the servers had nothing to do in {100 - 100 * sample:.0f} % of the last 10 steps' time"
    elif setting(settings, "rollout.servers") and min(collect, train) > 0.25:
        return (
            f"the ranks waited in {100 * collect:.0f} % of the last 10 steps' time, and the servers in "
            f"{100 * train:.0f} %"
        )
    return None


def _has_gained(history: History) -> bool:
    """True if the reward is higher than at the run's beginning; True where it is not known."""
    before, now = _mean(history.first, "reward_mean", first=5), _mean(history.recent, "reward_mean", last=5)
    return before is None or now is None or now > before + 0.05


def _mean(
    rows: Sequence[Row], name: str, *, first: int | None = None, last: int | None = None
) -> float | None:
    """Mean over a number of first or last rows; None if there are fewer rows, or a row lacks the value."""
    wanted = rows[-last:] if last is not None else rows[:first]
    values = [row[name] for row in wanted if name in row]
    if len(values) < (last or first or len(rows)) or not values:
        return None
    return statistics.fmean(values)


CHECKS = (
    Check(
        name="truncated",
        see=_truncated,
        why="A truncated answer usually has no result, so its reward says little about the policy.",
        look_at=("data.max_response_tokens", "objective.truncated", "reward.overlong"),
    ),
    Check(
        name="equal groups",
        see=_equal_groups,
        why="All advantages are 0: the policy learns nothing from its own answers.",
        look_at=("data.prompts", "batch.rollouts", "batch.sampling_attempts", "reward.kind"),
    ),
    Check(
        name="zero gradient",
        see=_zero_gradient,
        why="Trained tokens must give a gradient. Weights that overflow or underflow hide it.",
        look_at=("model.path", "model.dtype", "precision"),
    ),
    Check(
        name="entropy collapse",
        see=_entropy_collapse,
        why="The answers to a prompt become alike, so later steps have little to learn from.",
        look_at=("objective.entropy_bonus", "objective.clip_high", "optim.lr", "method.mu"),
    ),
    Check(
        name="entropy spike",
        see=_entropy_spike,
        why="The policy is losing what it knew; the run often breaks soon after.",
        look_at=("optim.lr", "objective.clip_low", "objective.dual_clip", "optim.clip_grad"),
    ),
    Check(
        name="failed gradings",
        see=_failed_gradings,
        why="The rewards may show faults of the grader and not of the answers: read grader_error in samples/.",
        look_at=("reward.kind", "reward.timeout_s", "reward.answer_marker"),
    ),
    Check(
        name="length drift",
        see=_length_drift,
        why="The length of the answers changes without a gain.",
        look_at=("objective.aggregation", "reward.overlong", "method.mu"),
    ),
    Check(
        name="log-prob gap",
        see=_gap_trend,
        why="The log-probs of trainer and vLLM differ more and more for the same weights.",
        look_at=("rollout.max_logprob_gap", "model.dtype", "rollout.dtype", "precision"),
    ),
    Check(
        name="temperatures",
        see=_temperatures,
        why="The policy loss and the SFT loss then train two different distributions.",
        look_at=("rollout.temperature", "method.sft_temperature"),
    ),
    Check(
        name="demonstrations used up",
        see=_used_up,
        why="The policy may overfit to these demonstrations.",
        look_at=("data.demonstrations", "batch.demonstrations", "method.mu"),
    ),
    Check(
        name="idle",
        see=_idle,
        why="GPUs that wait cost as much as GPUs that work.",
        look_at=("rollout.asynchronous", "rollout.partial", "rollout.servers", "parallel.ranks"),
    ),
)
