"""Compare packing with padding, on lengths like GSM8K's and like long reasoning: tokens passed, and balance over ranks.

    python benchmarks/packing.py [--samples 1024 --ranks 8 --max-tokens 32768]

Both put samples into micro-batches of at most ``--max-tokens`` tokens, with padding. Padding takes samples as drawn, or
sorted by length. Packing aligns sequences and micro-batches as tensor parallel 4 with sequence parallelism and context
parallel 2 need it. **Efficiency** is real tokens divided by tokens passed through the model. The number of packed
micro-batches is a multiple of the ranks; they are as full as this allows. **Imbalance** is the work of the most loaded
rank divided by the mean, with a 7B model's attention (a sequence of n tokens costs n + 1.5e-5 n^2).
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_chord.data.packing import balanced_bins, dealt, make_layout

ATTENTION = 1.5e-5
LAYOUT = make_layout(data=8, tensor=4, pipeline=1, context=2, sequence_parallel=True, virtual=False)
DISTRIBUTIONS = {
    "GSM8K-like": (
        lambda rng, n: rng.lognormal(np.log(90), 0.35, n) + rng.lognormal(np.log(160), 0.5, n),
        2048,
    ),
    "long-tailed": (lambda rng, n: rng.lognormal(np.log(5000), 0.75, n) + 200, 16384),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Packing against padding.")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks")
    parser.add_argument(
        "--max-tokens", type=int, default=32768, help="maximum number of tokens of a micro-batch"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table(
        title=f"{arguments.samples} samples, {arguments.ranks} ranks, micro-batches of {arguments.max_tokens} tokens"
    )
    for heading in ("lengths", "way", "micro-batches", "efficiency", "imbalance", "seconds to plan"):
        table.add_column(heading, justify="left" if heading in ("lengths", "way") else "right")
    worst_efficiency, worst_imbalance = 1.0, 1.0
    for name, (draw, longest) in DISTRIBUTIONS.items():
        drawn = draw(np.random.default_rng(arguments.seed), arguments.samples)
        lengths = np.clip(drawn, 40, longest).astype(int).tolist()
        work = [n + ATTENTION * n * n for n in lengths]
        title = f"{name}, mean {np.mean(lengths):.0f}, longest {max(lengths)}"
        for way, order in (("padded, as drawn", lengths), ("padded, sorted", sorted(lengths))):
            groups, efficiency, imbalance = padded(order, arguments)
            table.add_row(title, way, str(groups), f"{efficiency:.3f}", f"{imbalance:.3f}", "")
        start = time.perf_counter()
        aligned = [round_up(length, LAYOUT.sequence_multiple) for length in lengths]
        bins = balanced_bins(aligned, work, capacity=arguments.max_tokens, multiple=arguments.ranks)
        seconds = time.perf_counter() - start
        ranks = [sum(work[i] for members in hand for i in members) for hand in dealt(bins, arguments.ranks)]
        passed = sum(round_up(sum(aligned[i] for i in members), LAYOUT.batch_multiple) for members in bins)
        efficiency, imbalance = sum(lengths) / passed, max(ranks) / float(np.mean(ranks))
        worst_efficiency = min(worst_efficiency, efficiency)
        worst_imbalance = max(worst_imbalance, imbalance)
        row = (str(len(bins)), f"{efficiency:.3f}", f"{imbalance:.3f}", f"{seconds:.3f}")
        table.add_row(title, "packed", *row, end_section=True)
    Console(width=130).print(table, f"{time.strftime('%Y-%m-%d')}; {' '.join(sys.argv)}")
    passed_all = worst_efficiency >= 0.95 and worst_imbalance <= 1.02
    print(
        f"{'PASS' if passed_all else 'FAIL'}: packed, efficiency is at least 0.95 and imbalance at most 1.02"
    )
    return 0 if passed_all else 1


def padded(lengths: list[int], arguments: argparse.Namespace) -> tuple[int, float, float]:
    """Put samples into micro-batches in order, and give these to the ranks in turn.

    Returns the number of micro-batches, the efficiency and the imbalance.
    """
    groups: list[list[int]] = [[]]
    for length in lengths:
        if groups[-1] and (len(groups[-1]) + 1) * max(*groups[-1], length) > arguments.max_tokens:
            groups.append([])
        groups[-1].append(length)
    work = [len(group) * (max(group) + ATTENTION * max(group) ** 2) for group in groups]
    ranks = [sum(work[rank :: arguments.ranks]) for rank in range(arguments.ranks)]
    efficiency = sum(lengths) / sum(len(group) * max(group) for group in groups)
    return len(groups), efficiency, max(ranks) / float(np.mean(ranks))


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


if __name__ == "__main__":
    sys.exit(main())
