"""The paper's findings as criteria, fixed before the runs, and whether the runs meet them.

A criterion is a list of comparisons, and it is met when all of them hold. A comparison is one number for each seed,
usually the difference of two methods that have this seed, and therefore the same demonstrations and prompts. It holds
when the 95 % interval of its mean over seeds is wholly on the right side of a bound. Intervals are bootstrap intervals
over seeds (``megatron_chord.evaluation.metrics.bootstrap``). Nothing is selected by its result: the steps at which a
curve is read are constants in this file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_chord.evaluation.metrics import Interval, bootstrap

Record = Mapping[str, Any]
Records = Mapping[str, Mapping[int, Record]]
"""The records by method and seed."""
Number = Callable[[Mapping[str, Record]], float]
"""A number from the runs of one seed, given by method."""
Verdict = Literal["met", "not met", "not run"]

NOISE = 0.05
"""Two accuracies that differ by less are "the same within noise"."""
DIP, BEST = 0.1, 0.5
"""The shares of SFT's steps at which its curve is read: during the dip, and near its best (found on the tuning
seed)."""
EARLY, MIDDLE = (0.0, 0.2), (0.2, 0.6)
"""Parts of a run's steps for which an entropy is averaged."""


# ------------------------------------------------------------------------------------------------ what is read


def at(record: Record, share: float) -> Mapping[str, Mapping[str, float]]:
    """The evaluation nearest to this share of the run's steps."""
    rows = record["evaluations"]
    return min(rows, key=lambda row: abs(row["step"] - share * rows[-1]["step"]))


def value(record: Record, name: str = "accuracy", source: str = "first", *, share: float = 1.0) -> float:
    """A number of the evaluation nearest to this share of the run's steps, by default of the last one."""
    return at(record, share)[source][name]


def mean_of_steps(record: Record, name: str, part: tuple[float, float]) -> float:
    """Mean over the rollout steps in this part of the run. NaN if none of them has the number."""
    rows = record["steps"]
    first, last = (round(share * len(rows)) for share in part)
    found = [row[name] for row in rows[first:last] if name in row]
    return statistics.fmean(found) if found else math.nan


# -------------------------------------------------------------------------------------------------- criteria


@dataclass(frozen=True, kw_only=True)
class Comparison:
    text: str
    methods: tuple[str, ...]
    number: Number
    """Computed from the seed's runs of ``methods``."""
    above: float | None = 0.0
    """The lower bound of the interval. None: no bound."""
    below: float | None = None
    """The upper bound of the interval. None: no bound."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    key: str
    finding: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Result:
    comparison: Comparison
    interval: Interval | None
    """None: the runs are missing."""
    seeds: tuple[int, ...]
    verdict: Verdict


def difference(
    more: str, less: str, what: str, read: Callable[[Record], float], bound: float = 0.0
) -> Comparison:
    """Return ``read`` of one method's run minus that of the other's."""
    return Comparison(
        text=f"{what}: {more} - {less}",
        methods=(more, less),
        number=lambda runs: read(runs[more]) - read(runs[less]),
        above=bound,
    )


def same(one: str, other: str, what: str, read: Callable[[Record], float]) -> Comparison:
    return Comparison(
        text=f"{what}: {one} - {other}",
        methods=(one, other),
        number=lambda runs: read(runs[one]) - read(runs[other]),
        above=-NOISE,
        below=NOISE,
    )


def within(method: str, text: str, number: Callable[[Record], float]) -> Comparison:
    """A comparison that holds if a number of one method's run is above 0."""
    return Comparison(text=f"{text}: {method}", methods=(method,), number=lambda runs: number(runs[method]))


def first(record: Record) -> float:
    return value(record)


def second(record: Record) -> float:
    return value(record, source="second")


def entropy(record: Record) -> float:
    return mean_of_steps(record, "entropy", MIDDLE)


def length_halfway(record: Record) -> float:
    return value(record, "length", share=0.6)


def murmurs_halfway(record: Record) -> float:
    return value(record, "murmurs", share=0.6)


def loss_falls(record: Record) -> float:
    """Return by how much the training loss falls from SFT's best step to the end."""
    return mean_of_steps(record, "sft_nll", (BEST - 0.05, BEST + 0.05)) - mean_of_steps(
        record, "sft_nll", (0.9, 1.0)
    )


CRITERIA = (
    Criterion(
        key="sft_curve",
        finding="SFT shifts the policy, readapts it, then overfits",
        comparisons=(
            within(
                "sft",
                f"accuracy before - after {100 * DIP:.0f} % of the steps",
                lambda r: value(r, share=0) - value(r, share=DIP),
            ),
            within(
                "sft",
                f"accuracy after {100 * BEST:.0f} % of the steps - before",
                lambda r: value(r, share=BEST) - value(r, share=0),
            ),
            within(
                "sft",
                f"accuracy after {100 * BEST:.0f} % of the steps - at the end",
                lambda r: value(r, share=BEST) - value(r),
            ),
            within("sft", f"training loss after {100 * BEST:.0f} % of the steps - at the end", loss_falls),
        ),
    ),
    Criterion(
        key="switch",
        finding="It matters when SFT-then-RL switches, and the best switch differs between two abilities",
        comparisons=(
            difference("sft_best_rl", "sft_light_rl", "first ability", first),
            difference("sft_light_rl", "sft_best_rl", "second ability", second),
        ),
    ),
    Criterion(
        key="constant_mu",
        finding="A constant mu without phi loses to a decaying one; 0.02 is pure RL within noise",
        comparisons=(
            difference("chord_mu", "constant_0.1", "first ability", first),
            difference("chord_mu", "constant_0.5", "first ability", first),
            same("constant_0.02", "grpo", "first ability", first),
        ),
    ),
    Criterion(
        key="entropy",
        finding="Entropy: the plain SFT term raises it, the weight p lets it collapse, phi is between",
        comparisons=(
            difference("chord_mu", "grpo", "entropy at rollout tokens", entropy),
            difference("chord_mu", "chord_phi", "entropy at rollout tokens", entropy),
            difference("chord_phi", "p_weight", "entropy at rollout tokens", entropy),
            difference("grpo", "p_weight", "entropy at rollout tokens", entropy),
        ),
    ),
    Criterion(
        key="length",
        finding="Length: CHORD-mu takes over the demonstrations', CHORD-phi is between them and RL",
        comparisons=(
            difference("chord_mu", "chord_phi", "answer length after 60 % of the steps", length_halfway),
            difference("chord_phi", "grpo", "answer length after 60 % of the steps", length_halfway),
            difference("chord_mu", "chord_phi", "murmurs after 60 % of the steps", murmurs_halfway),
        ),
    ),
    Criterion(
        key="second_ability",
        finding="phi keeps the second ability better than mu",
        comparisons=(difference("chord_phi", "chord_mu", "second ability", second),),
    ),
    Criterion(
        key="phi_mu",
        finding="CHORD-phi is at least as good as CHORD-mu on the first ability",
        comparisons=(difference("chord_phi", "chord_mu", "first ability", first, -0.02),),
    ),
    Criterion(
        key="chord_best",
        finding="CHORD-mu is better than SFT + RL, GRPO, LUFFY and SASR on the first ability",
        comparisons=tuple(
            difference("chord_mu", other, "first ability", first)
            for other in ("grpo", "grpo_low_rate", "sft", "sft_light_rl", "sft_best_rl", "luffy", "sasr")
        ),
    ),
)


def judge(comparison: Comparison, records: Records) -> Result:
    """Judge a comparison. It needs at least two seeds that have all of its methods. With fewer it is "not run"."""
    runs = [records.get(method, {}) for method in comparison.methods]
    seeds = tuple(sorted(set.intersection(*(set(by_seed) for by_seed in runs))))
    if len(seeds) < 2:
        return Result(comparison, None, seeds, "not run")
    numbers = [
        comparison.number({method: records[method][seed] for method in comparison.methods}) for seed in seeds
    ]
    interval = bootstrap([numbers], seed=0)
    holds = (comparison.above is None or interval.low > comparison.above) and (
        comparison.below is None or interval.high < comparison.below
    )
    return Result(comparison, interval, seeds, "met" if holds else "not met")


def verdict(results: Sequence[Result]) -> Verdict:
    """Return the verdict of a criterion: met if all comparisons are met, not run if one of them could not be made."""
    found = {result.verdict for result in results}
    return "not run" if "not run" in found else "not met" if "not met" in found else "met"
