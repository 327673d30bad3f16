"""The results as tables of Markdown, put between markers of ``docs/evidence.md``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_chord.evaluation.metrics import bootstrap

from .criteria import CRITERIA, EARLY, MIDDLE, Record, Records, Result, judge, mean_of_steps, value, verdict
from .plan import COMPARED, FIRST_STAGE, NAMES

NOT_RUN = "not run yet"


def criteria_table(records: Records) -> str:
    lines = [
        "| finding | comparison, mean over seeds | must be | measured, 95 % interval | |",
        "|---|---|---|--:|---|",
    ]
    for criterion in CRITERIA:
        results = [judge(comparison, records) for comparison in criterion.comparisons]
        lines.append(f"| **{criterion.finding}** | | | | **{verdict(results)}** |")
        lines += [f"| | {r.comparison.text} | {_bounds(r)} | {_measured(r)} | {r.verdict} |" for r in results]
    return "\n".join(lines)


def _bounds(result: Result) -> str:
    comparison = result.comparison
    parts = []
    if comparison.above is not None:
        parts.append(f"above {comparison.above:g}")
    if comparison.below is not None:
        parts.append(f"below {comparison.below:g}")
    return " and ".join(parts)


def _measured(result: Result) -> str:
    if result.interval is None:
        return NOT_RUN
    interval = result.interval
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f}), {len(result.seeds)} seeds"


COLUMNS = (
    "first ability", "second", "transfer", "answer length", "murmurs", "demonstrations' style",
    "entropy, first 20 %", "to 60 %", "last 20 %",
)  # fmt: skip


def methods_table(records: Records) -> str:
    """The last evaluation of every method. Means over seeds, with bootstrap intervals for the accuracies."""
    lines = [f"| method | seeds | {' | '.join(COLUMNS)} |", f"|---|--:|{'--:|' * len(COLUMNS)}"]
    before = {
        seed: {"evaluations": run["evaluations"][:1], "steps": []}
        for name, by_seed in records.items()
        if name not in FIRST_STAGE
        for seed, run in by_seed.items()
    }
    if before:
        lines.append(_row("base policy", before))
    for name, title in NAMES.items():
        runs = records.get(name, {})
        title = title if name in COMPARED else f"*{title}*"
        lines.append(_row(title, runs) if runs else f"| {title} | {NOT_RUN} |{' |' * len(COLUMNS)}")
    return "\n".join(lines)


def _row(title: str, runs: Mapping[int, Record]) -> str:
    records = list(runs.values())
    cells = [
        _percent([value(r, source=source) for r in records]) for source in ("first", "second", "transfer")
    ]
    cells += [_number([value(r, name) for r in records]) for name in ("length", "murmurs")]
    cells.append(_number([value(r, "steps_style") for r in records], 2))
    cells += [
        _number([mean_of_steps(r, "entropy", part) for r in records], 2)
        for part in (EARLY, MIDDLE, (0.8, 1.0))
    ]
    return f"| {title} | {len(records)} | {' | '.join(cells)} |"


def _percent(values: Sequence[float]) -> str:
    interval = bootstrap([values], seed=0)
    return f"{100 * interval.value:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def _number(values: Sequence[float], digits: int = 1) -> str:
    mean = statistics.fmean(values)
    return "-" if mean != mean else f"{mean:.{digits}f}"


def provenance(records: Records, minutes: float | None) -> str:
    """Return when, with which versions and how long the runs ran."""
    runs = [run for by_seed in records.values() for run in by_seed.values()]
    if not runs:
        return f"The whole benchmark was {NOT_RUN}."
    versions = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items())
    seeds = sorted({seed for by_seed in records.values() for seed in by_seed})
    hours = sum(run["cpu_seconds"] for run in runs) / 3600
    took = f" The command took {minutes:.0f} minutes." if minutes is not None else ""
    day = max(run["finished"] for run in runs)[:10]
    listed = ", ".join(map(str, seeds))
    return f"{len(runs)} runs, seeds {listed}, finished on {day}; {hours:.1f} hours of CPU time.{took} {versions}."


def figures(paths: Sequence[Path], docs: Path) -> str:
    """Links to the figures, relative to the folder of the page."""
    return "\n\n".join(f"![{path.stem}]({path.relative_to(docs).as_posix()})" for path in paths) or NOT_RUN


def put_between(text: str, name: str, content: str) -> str:
    """The page with ``content`` between the markers of that name. Raises ValueError if there are none."""
    begin, end = f"<!-- {name}: written by benchmarks/paper_in_small.py -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no markers {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def fill(page: Path, parts: Mapping[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = put_between(text, name, content)
    page.write_text(text, encoding="utf-8")
