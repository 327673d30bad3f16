"""`megatron-chord mu preview`: shows mu at every step and how many rollouts and demonstrations a run needs."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_chord.config import RunConfig
from megatron_chord.config_methods import ChordConfig
from megatron_chord.schedules import (
    GradientNorm,
    Learned,
    MuSchedule,
    NoiseAware,
    RewardAdaptive,
    ScheduleInput,
)

MOST_ROWS = 20
_WIDTH = 80
_TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Row:
    """mu of the steps ``first`` to ``last``. None: it depends on what the run will measure."""

    first: int
    last: int
    mu: float | None


@dataclass(frozen=True)
class Range:
    """The smallest and the largest possible number."""

    least: float
    most: float


@dataclass(frozen=True)
class Facts:
    """Numbers of a whole run."""

    zero: Range
    """Number of steps with mu = 0."""
    one: Range
    """Number of steps with mu = 1."""
    mean: Range
    """Mean of mu over the steps."""
    demonstrations: Range
    """Number of demonstrations that are trained."""
    rollouts: Range
    """Number of rollouts that are sampled."""


@dataclass(frozen=True)
class Glyphs:
    """The characters of a plot in text: bars of ascending height for one cell, and special cells."""

    levels: str
    mixed: str
    unknown: str
    tick: str
    corner: str
    line: str


BLOCKS = Glyphs(" ▁▂▃▄▅▆▇█", "░", "·", "┤", "└", "─")
ASCII = Glyphs(" .:#", "|", "?", "|", "+", "-")


def lines(run: RunConfig, *, plain: bool = False) -> Iterator[str]:
    """The lines of the preview. ``plain``: use only ASCII characters."""
    mu = schedule_of(run)
    if mu is None:
        yield f"method {run.method.name} does not use mu; only method chord does (method.mu)"
        return
    yield from textwrap.wrap(f"mu: {_settings(mu)}", _WIDTH, subsequent_indent="    ")
    yield f"{run.steps} steps, the first is 0"
    yield ""
    yield from _table(run, mu)
    yield ""
    glyphs = ASCII if plain else BLOCKS
    yield from _plot(run, mu, glyphs)
    yield ""
    yield from _facts(run, mu)
    for note in notes(run, mu):
        yield from textwrap.wrap(note, _WIDTH, initial_indent="- ", subsequent_indent="  ")


def schedule_of(run: RunConfig) -> MuSchedule | None:
    """The schedule of mu; None for a method without mu."""
    return run.method.mu if isinstance(run.method, ChordConfig) else None


def known_mu(mu: MuSchedule, steps: int, seed: int = 0) -> list[float | None]:
    """mu of each step; None for steps where it depends on what the run will measure."""
    known = steps if mu.known_steps is None else min(mu.known_steps, steps)
    return [
        *(mu.value(ScheduleInput(step=step, seed=seed)) for step in range(known)),
        *[None] * (steps - known),
    ]


def rows(run: RunConfig, most: int = MOST_ROWS) -> list[Row]:
    """The rows of the table: ranges of steps with equal mu. If these are too many: steps where the rule changes, and
    round numbers between them."""
    mu = schedule_of(run)
    if mu is None:
        return []
    ranges = _ranges(known_mu(mu, run.steps, run.seed))
    if len(ranges) <= most:
        return ranges
    marks = {0, run.steps - 1} | {step for turn in mu.turns(run.steps) for step in (turn - 1, turn)}
    firsts = [row.first for row in ranges]
    kept = sorted({bisect.bisect_right(firsts, step) - 1 for step in marks if 0 <= step < run.steps})
    if len(kept) > most:
        kept = kept[: most - 2] + kept[-2:]
    for spacing in _round_numbers():
        chosen = {*kept, *(index for index, first in enumerate(firsts) if first % spacing == 0)}
        if len(chosen) <= most:
            return [ranges[index] for index in sorted(chosen)]
    raise AssertionError


def reward_rows(mu: RewardAdaptive) -> list[tuple[float, float]]:
    """(mean reward, mu) for mean rewards from -1 to 1 in steps of 0.25, and for those where mu reaches a bound."""
    rewards = {quarter / 4 for quarter in range(-4, 5)} | {mu.tau - 1, mu.tau}
    return [(reward, mu.value(ScheduleInput(step=0, reward_mean=reward))) for reward in sorted(rewards)]


def facts(run: RunConfig, mu: MuSchedule) -> Facts:
    """How many steps, demonstrations and rollouts a run with this schedule has."""
    values = known_mu(mu, run.steps, run.seed)
    known = [value for value in values if value is not None]
    unknown = len(values) - len(known)
    low, high = _unknown_bounds(mu)
    zero = Range(known.count(0.0), known.count(0.0) + unknown * (low == 0))
    one = Range(known.count(1.0), known.count(1.0) + unknown * (high == 1))
    total = math.fsum(known)
    sampled = (
        Range(run.steps, run.steps)
        if mu.needs_rewards
        else Range(run.steps - one.most, run.steps - one.least)
    )
    return Facts(
        zero=zero,
        one=one,
        mean=Range((total + low * unknown) / run.steps, (total + high * unknown) / run.steps),
        demonstrations=_times(Range(run.steps - zero.most, run.steps - zero.least), run.batch.demonstrations),
        rollouts=_times(sampled, run.batch.prompts * run.batch.rollouts),
    )


def notes(run: RunConfig, mu: MuSchedule) -> Iterator[str]:
    """Remarks about the schedule and about sampling."""
    if isinstance(mu, RewardAdaptive):
        yield "mu depends on the mean reward of each step's rollouts, so every step samples"
    if isinstance(mu, GradientNorm):
        yield (
            f"after {mu.warmup_steps} steps of SFT, a step is SFT (mu 1) with probability G / (G + {mu.gamma:g} G0), "
            f"otherwise RL (mu 0). The probability is {1 / (1 + mu.gamma):.4g} while the gradient norm G equals G0, "
            "that of the warm-up"
        )
    if isinstance(mu, Learned):
        yield (
            f"experimental: mu is {mu.initial:g} at step {mu.sft_steps}, then learned within "
            f"[{mu.low:g}, {mu.high:g}]"
        )
    if isinstance(mu, NoiseAware):
        yield (
            f"mu is {mu.initial:g} at step 0, then within [{mu.low:g}, {mu.high:g}] as the measured noise demands; it "
            f"changes by at most {mu.max_step:g} a step"
        )
    reset = next((step for step in range(run.steps) if mu.resets_optimizer(step)), None)
    if reset is not None:
        yield f"the optimizer and its learning-rate schedule are reset before step {reset}"
    if run.batch.sampling_attempts > 1:
        yield f"dynamic sampling may draw up to {run.batch.sampling_attempts} times as many rollouts"
    if extra := run.rollout.extra_of(run.batch.prompts):
        yield (
            f"up to {extra} of a step's prompts are stopped unfinished (rollout.partial) and finished in a later "
            "step"
            if run.rollout.carries
            else f"up to {extra} more prompts a step are sampled and dropped unfinished (rollout.partial)"
        )


def text_plot(
    values: Sequence[float | None],
    *,
    ends: tuple[str, str] | None = None,
    glyphs: Glyphs = BLOCKS,
    width: int = 72,
    height: int = 8,
) -> str:
    """Bars of ``values``, in at most ``width`` columns and 7 more for the scale. None is drawn as unknown.

    ``ends``: labels of the first and the last value. Default: their indices.
    """
    columns = _columns(values, width)
    highest = 1.0 if None in columns else max(column[1] for column in columns if column)
    top = next((top for top in _TOPS if top >= highest > 0), 1.0)
    labels = {height - 1: f"{top:g}", height // 2 - 1: f"{top / 2:g}"}
    drawn: list[str] = []
    for row in reversed(range(height)):
        cells = "".join(_cell(column, row, height / top, glyphs) for column in columns)
        drawn.append(f"{labels.get(row, ''):>5} {glyphs.tick}{cells}".rstrip())
    drawn.append(f"{'0':>5} {glyphs.corner}{glyphs.line * len(columns)}")
    left, right = ends or ("0", str(len(values) - 1))
    drawn.append(" " * 7 + (left if left == right else left + right.rjust(len(columns) - len(left))))
    return "\n".join(drawn)


def save_plot(run: RunConfig, path: Path) -> None:
    """Draw mu over the steps into an image file. A schedule that depends only on the reward is drawn over the reward.

    Raises:
        ValueError: matplotlib is missing, the run has no mu, or matplotlib cannot write this kind of file.
        OSError: the file cannot be written.
    """
    mu = schedule_of(run)
    if mu is None:
        raise ValueError(f"nothing to plot: method {run.method.name} does not use mu")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"--plot needs matplotlib ({error}); install it with: pip install 'matplotlib>=3.9'"
        ) from error
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    if isinstance(mu, RewardAdaptive):
        rewards, values = zip(*reward_rows(mu), strict=True)
        axes.plot(rewards, values)
        axes.set_xlabel("mean reward of the step's rollouts")
    else:
        values = known_mu(mu, run.steps, run.seed)
        known = [value for value in values if value is not None]
        axes.plot(range(len(known)), known, drawstyle="steps-post", marker="." if len(known) < 50 else "")
        if len(known) < run.steps:
            low, high = _unknown_bounds(mu)
            axes.axhspan(low, high, len(known) / run.steps, alpha=0.2, label="depends on the run")
            axes.legend()
        axes.set_xlim(0, run.steps)
        axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mu")
    axes.set_title(textwrap.fill(_settings(mu), 90), fontsize="small")
    figure.savefig(path, format=path.suffix[1:] or "png", dpi=150)


def _settings(mu: MuSchedule) -> str:
    names = [field.name for field in dataclasses.fields(mu) if field.name != "schedule"]
    return ", ".join([mu.schedule, *(f"{name} {getattr(mu, name)}" for name in names)])


def _table(run: RunConfig, mu: MuSchedule) -> Iterator[str]:
    table = rows(run)
    labels = [f"{row.first}" if row.first == row.last else f"{row.first} - {row.last}" for row in table]
    wide = max(5, *(len(label) for label in labels))
    low, high = _unknown_bounds(mu)
    turns = mu.turns(run.steps)
    yield f"{'steps':>{wide}}  mu"
    for before, row, label in zip([None, *table], table, labels, strict=False):
        if before and any(before.last < turn < row.first for turn in turns):
            yield f"{'...':>{wide}}"
        shown = f"{low:g} to {high:g}, depends on the run" if row.mu is None else f"{row.mu:.4g}"
        yield f"{label:>{wide}}  {shown}"
    if isinstance(mu, RewardAdaptive):
        yield ""
        yield "mean reward  mu"
        yield from (f"{reward:>11.4g}  {value:.4g}" for reward, value in reward_rows(mu))


def _plot(run: RunConfig, mu: MuSchedule, glyphs: Glyphs) -> Iterator[str]:
    if isinstance(mu, RewardAdaptive):
        low, high = min(-1.0, mu.tau - 1), max(1.0, mu.tau)
        rewards = [low + (high - low) * index / 71 for index in range(72)]
        values = [mu.value(ScheduleInput(step=0, reward_mean=reward)) for reward in rewards]
        yield "mu over the mean reward"
        yield from text_plot(values, ends=(f"{low:.4g}", f"{high:.4g}"), glyphs=glyphs).splitlines()
        return
    drawing = text_plot(known_mu(mu, run.steps, run.seed), glyphs=glyphs).splitlines()
    yield "mu over the steps"
    yield from drawing
    cells = "".join(line[7:] for line in drawing)
    if glyphs.mixed in cells:
        yield f"       {glyphs.mixed} mu varies within the column: filled to its mean, shaded to its top"
    if glyphs.unknown in cells:
        yield f"       {glyphs.unknown} known only during the run"


def _facts(run: RunConfig, mu: MuSchedule) -> Iterator[str]:
    of = facts(run, mu)
    idle = "their rollouts are not trained on" if mu.needs_rewards else "no rollouts"
    yield f"steps with mu = 0 (no SFT pass): {_shown(of.zero)}"
    yield f"steps with mu = 1 ({idle}): {_shown(of.one)}"
    yield f"mean mu: {_shown(of.mean)}"
    yield f"demonstrations over the run: {_shown(of.demonstrations)}"
    yield f"rollouts over the run: {_shown(of.rollouts)}"


def _shown(of: Range) -> str:
    ends = [f"{end:,}" if isinstance(end, int) else f"{end:.4g}" for end in (of.least, of.most)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _times(of: Range, factor: int) -> Range:
    return Range(of.least * factor, of.most * factor)


def _unknown_bounds(mu: MuSchedule) -> tuple[float, float]:
    """The bounds of mu at the steps where it is not known before the run."""
    return (mu.low, mu.high) if isinstance(mu, Learned) else mu.bounds()


def _ranges(values: Sequence[float | None]) -> list[Row]:
    groups = (list(group) for _, group in itertools.groupby(enumerate(values), key=lambda item: item[1]))
    return [Row(group[0][0], group[-1][0], group[0][1]) for group in groups]


def _round_numbers() -> Iterator[int]:
    return (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))


def _columns(values: Sequence[float | None], width: int) -> list[tuple[float, float] | None]:
    """The mean and the largest value of each column. A value fills several columns, or a column has several values.
    None: unknown."""
    count = len(values)
    if count <= width:
        bins = [[value] for value in values for _ in range(width // count)]
    else:
        bins = [values[i * count // width : (i + 1) * count // width] for i in range(width)]
    columns: list[tuple[float, float] | None] = []
    for part in bins:
        known = [value for value in part if value is not None]
        columns.append((math.fsum(known) / len(known), max(known)) if len(known) == len(part) else None)
    return columns


def _cell(column: tuple[float, float] | None, row: int, scale: float, glyphs: Glyphs) -> str:
    if column is None:
        return glyphs.unknown
    mean, greatest = (end * scale - row for end in column)
    full = len(glyphs.levels) - 1
    level = min(max(round(mean * full), 0), full)
    if level == 0 and greatest - mean > 1 and greatest >= 0.5:
        return glyphs.mixed
    if row == 0 and column[1] > 0:
        level = max(level, 1)  # mu > 0 always has a visible bar
    return glyphs.levels[level]
