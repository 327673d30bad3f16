"""Measure how each part grows with tokens, vocabulary, group size, ranks, bytes and samples, in one table each.

    python benchmarks/growth.py [TABLE ...] [--rounds 2]      # all tables: 15 minutes on two cores

In a table one quantity doubles from row to row (as nearly as samples allow), and the rest stays. **exponent** is the
slope between a row and the row above it on logarithmic axes: 1 is linear growth, 0 none, 2 quadratic. The last line
fits all rows. A part with a fixed share stays below 1 while that share matters. The named program measures each row in
processes of their own. All rows take turns for ``--rounds`` rounds, and the fastest round counts. Seconds are CPU
time, that of the slowest rank if there are several. For a push they are elapsed time. Memory is the extra peak of
these programs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from samples import make_samples
from shared import circumstances, in_ranks, save_qwen2

from megatron_chord.data.packing import make_layout, plan_step
from megatron_chord.records import Part, TrainSample

HERE = Path(__file__).resolve().parent
MODEL = {"hidden": 512, "layers": 2, "vocab": 4096}
"""The model of the step, so small that fixed costs of a step would show. 2 key-value heads allow 2 tensor ranks."""
SHAPE = ", ".join(f"{name} {value}" for name, value in MODEL.items())


@dataclass(frozen=True, kw_only=True)
class Row:
    label: str
    amount: float
    """The amount of what grows."""
    seconds: float
    extra_bytes: float | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    title: str
    what: str
    """What grows, with its unit."""
    points: Sequence[Any]
    measure: Callable[[Any, Path], Row]
    is_scale: bool = True
    """Whether the rows are amounts of one thing. Only then growth has an exponent."""


def main() -> int:
    parser = argparse.ArgumentParser(description="How each part grows.")
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"tables among {', '.join(SERIES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.tables) - set(SERIES)
    if unknown:
        parser.error(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(SERIES)}")
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name)
        save_qwen2(model, **MODEL)
        for name in arguments.tables or SERIES:
            series = SERIES[name]
            rounds = [
                [series.measure(point, model) for point in series.points] for _ in range(arguments.rounds)
            ]
            show(
                series,
                [min(rows, key=lambda row: row.seconds) for rows in zip(*rounds, strict=True)],
                console,
            )
    console.print(circumstances(), highlight=False)
    return 0


def head(tokens: int, vocab: int, ranks: int = 1) -> tuple[float, float]:
    """Return CPU seconds and extra bytes of the log-prob head: those of the slowest rank and of the fullest rank."""
    options = {"child": "chunked", "tokens": tokens, "vocab": vocab, "hidden": 256}
    found = children("logprob_head.py", options, ranks)
    return max(row["seconds"] for row in found), max(row["extra_bytes"] for row in found)


def head_by_tokens(tokens: int, _: Path) -> Row:
    seconds, extra = head(tokens, 32_000)
    return Row(label=str(tokens), amount=tokens, seconds=seconds, extra_bytes=extra)


def head_by_vocabulary(vocab: int, _: Path) -> Row:
    seconds, extra = head(1024, vocab)
    return Row(label=str(vocab), amount=vocab, seconds=seconds, extra_bytes=extra)


def step(
    model: Path, *, rollouts: int, demonstrations: int, group: int = 1, tensor: int = 1, ranks: int = 1
) -> list[dict[str, Any]]:
    options = {
        "child": "ours",
        "model": model,
        "rollouts": rollouts,
        "demonstrations": demonstrations,
        "group": group,
        "tensor": tensor,
        "max-tokens": 1024,
        "updates": 1,
        "vocab": MODEL["vocab"],
    }
    return children("step.py", options, ranks)


def step_by_tokens(samples: int, model: Path) -> Row:
    (found,) = step(model, rollouts=samples - samples // 4, demonstrations=samples // 4)
    tokens = found["tokens"]
    return Row(
        label=f"{tokens} in {samples} samples",
        amount=tokens,
        seconds=found["seconds"],
        extra_bytes=found["extra"],
    )


def step_by_group(group: int, model: Path) -> Row:
    """Measure a step with 2 prompts. The remark says what would be left if all rollouts of a prompt shared one pass of
    it."""
    (found,) = step(model, rollouts=2 * group, demonstrations=0, group=group)
    drawn = make_samples(rollouts=2 * group, demonstrations=0, group=group, vocab=MODEL["vocab"])
    prompts = {tuple(sample.token_ids[: sample.parts[0].positions[0]].tolist()) for sample in drawn}
    once = sum(len(sample.parts[0].positions) for sample in drawn) + sum(map(len, prompts))
    return Row(
        label=f"{group} ({found['tokens']} tokens)",
        amount=group,
        seconds=found["seconds"],
        extra_bytes=found["extra"],
        remark=f"{once / found['tokens']:.2f} of the tokens, were prompts passed once",
    )


RANKS: Mapping[str, tuple[int, int]] = {"1": (1, 1), "2, data": (2, 1), "2, tensor": (2, 2)}


def step_by_ranks(layout: str, model: Path) -> Row:
    ranks, tensor = RANKS[layout]
    found = step(model, rollouts=12, demonstrations=4, tensor=tensor, ranks=ranks)
    return Row(
        label=layout,
        amount=ranks,
        seconds=max(row["seconds"] for row in found),
        extra_bytes=max(row["extra"] for row in found),
        remark=f"{max(row['elapsed'] for row in found):.2f} s elapsed",
    )


def head_by_ranks(ranks: int, _: Path) -> Row:
    seconds, extra = head(1024, 152_064, ranks)
    return Row(label=str(ranks), amount=ranks, seconds=seconds, extra_bytes=extra)


def push_by_bytes(hidden: int, _: Path) -> Row:
    command = [sys.executable, str(HERE / "sync.py"), "--hidden", str(hidden), "--layers", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = json.loads(lines[-1])
    seconds = min(found["seconds"])
    return Row(
        label=f"{found['bytes'] / 1e6:.0f}",
        amount=found["bytes"],
        seconds=seconds,
        remark=f"{found['bytes'] / seconds / 1e9:.2f} GB/s, {seconds / min(found['copies']):.1f}x a copy",
    )


def packing_by_samples(count: int, _: Path) -> Row:
    """Measure the way from samples to the micro-batches of 8 data-parallel ranks, with their arrays."""
    rng = np.random.default_rng(0)
    samples = []
    for length in np.clip(rng.lognormal(np.log(250), 0.4, count), 40, 2048).astype(int):
        ids = rng.integers(0, 1000, length)
        constants = {"advantage": 1.0, "rollout_logprob": np.zeros(length // 2, np.float32)}
        part = Part(term="policy", positions=np.arange(length - length // 2, length), constants=constants)
        samples.append(TrainSample(token_ids=ids, parts=(part,)))
    layout = make_layout(data=8, tensor=1, pipeline=1, context=1, sequence_parallel=False, virtual=False)
    begun = time.process_time()
    plan_step(samples, max_tokens=32_768, layout=layout, pad_id=0)
    return Row(label=str(count), amount=count, seconds=time.process_time() - begun)


SERIES = {
    "head-tokens": Series(
        title="log-prob head: vocabulary 32000, hidden 256",
        what="tokens",
        points=(512, 1024, 2048, 4096),
        measure=head_by_tokens,
    ),
    "head-vocabulary": Series(
        title="log-prob head: 1024 tokens, hidden 256",
        what="vocabulary",
        points=(19_008, 38_016, 76_032, 152_064),
        measure=head_by_vocabulary,
    ),
    "head-ranks": Series(
        title="log-prob head: 1024 tokens, vocabulary 152064 over the ranks, hidden 256",
        what="tensor ranks",
        points=(1, 2),
        measure=head_by_ranks,
    ),
    "step-tokens": Series(
        title=f"a CHORD step, a quarter of it demonstrations; {SHAPE}",
        what="tokens",
        points=(4, 8, 16, 32),
        measure=step_by_tokens,
    ),
    "step-group": Series(
        title=f"a GRPO step on 2 prompts; {SHAPE}",
        what="rollouts of a prompt",
        points=(2, 4, 8, 16),
        measure=step_by_group,
    ),
    "step-ranks": Series(
        title=f"a CHORD step of 12 rollouts and 4 demonstrations; {SHAPE}",
        what="ranks",
        points=tuple(RANKS),
        measure=step_by_ranks,
        is_scale=False,
    ),
    "push": Series(
        title="a push of weights to a vLLM server on this machine",
        what="MB",
        points=(256, 512, 1024),
        measure=push_by_bytes,
    ),
    "packing": Series(
        title="packing an update",
        what="samples",
        points=(1024, 2048, 4096, 8192, 16384),
        measure=packing_by_samples,
    ),
}


def children(program: str, options: Mapping[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Return what the child processes of a benchmark report, by rank."""
    command = [sys.executable, str(HERE / program)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return in_ranks(command, ranks)


def show(series: Series, rows: Sequence[Row], console: Console) -> None:
    def with_exponent(values: Sequence[str], name: str) -> list[list[str]]:
        if not series.is_scale:
            return [[value] for value in values]
        pairs = zip([None, *rows], rows, strict=False)
        return [[value, slope(pair, name)] for value, pair in zip(values, pairs, strict=True)]

    exponent = ["exponent"] * series.is_scale
    headings = [series.what, "seconds", *exponent]
    cells = [[row.label] for row in rows]
    columns = [with_exponent([f"{row.seconds:.3g}" for row in rows], "seconds")]
    sizes = [row.extra_bytes / 1e9 for row in rows if row.extra_bytes is not None]
    if sizes:
        headings += ["extra peak GB", *exponent]
        columns.append(with_exponent([f"{size:.2f}" for size in sizes], "extra_bytes"))
    if any(row.remark for row in rows):
        headings.append("remark")
        columns.append([[row.remark] for row in rows])
    table = Table(title=series.title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "remark" else "right")
    for index, cell in enumerate(cells):
        table.add_row(*cell, *(text for column in columns for text in column[index]))
    console.print(table)
    if series.is_scale:
        memory = f", memory to the power {slope(rows, 'extra_bytes')}" if sizes else ""
        console.print(f"time grows as {series.what} to the power {slope(rows, 'seconds')}{memory}")
    console.print()


def slope(rows: Sequence[Row | None], name: str) -> str:
    """Return the slope of a least-squares line through the logarithms. Return nothing if there is no row above."""
    known = [row for row in rows if row is not None]
    if len(known) < 2:
        return ""
    amounts = [math.log(row.amount) for row in known]
    values = [math.log(getattr(row, name)) for row in known]
    return f"{np.polyfit(amounts, values, 1)[0]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
