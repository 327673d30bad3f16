"""Measure on one GPU in half an hour: what the project computes, how fast, and what the GPU could do at most.

    python -m benchmarks.gpu [--budget 1800] [--parts NAME,NAME] [--out FOLDER]     # from the project's root
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --tiny                     # a rehearsal on a CPU
    python -m benchmarks.gpu --table FOLDER [FOLDER]    # finished runs again

benchmarks/gpu/README.md explains each step. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu import table
from benchmarks.gpu.driver import ROWS, run_parts
from benchmarks.gpu.machine import ask
from benchmarks.gpu.parts import BY_NAME, PARTS, Part
from benchmarks.gpu.rows import CEILINGS


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    console = Console(width=table.WIDTH)
    if arguments.list:
        console.print(listing())
        return 0
    if arguments.table:
        try:
            rows = table.rows_of(arguments.table)
        except ValueError as error:
            parser.error(str(error))
        table.show(rows, console)
        return 0
    parts = chosen(arguments.parts, parser)
    folder: Path = arguments.out or Path(time.strftime("gpu-%Y%m%d-%H%M%S"))
    if (folder / ROWS).exists():
        parser.error(f"--out {folder} holds the rows of another run: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    machine = ask()
    if not machine.has_cuda and not arguments.tiny:
        parser.error(f"torch sees no CUDA device here ({machine.gpu}); --tiny rehearses the parts on a CPU")
    console.print(f"{machine.gpu}; rows, logs and table in {folder}", highlight=False)
    rows = run_parts(
        parts,
        machine,
        folder=folder.resolve(),
        budget=arguments.budget,
        tiny=arguments.tiny,
        say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    table.save(rows, folder / "table.txt")
    table.show(rows, console)
    return int(any(row["status"] == "failed" for row in rows))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Checks and measurements on one GPU, most valuable first.",
    )
    parser.add_argument(
        "--parts", help=f"names with commas between them (default: all); {CEILINGS} always runs"
    )
    parser.add_argument("--budget", type=float, default=1800, help="seconds for all parts (default: 1800)")
    parser.add_argument(
        "--out", type=Path, help="folder for rows, logs and table (default: gpu-DATE-TIME here)"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal, also without a GPU")
    parser.add_argument(
        "--list", action="store_true", help="say what parts there are, in their order, and stop"
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="FOLDER", help="show finished runs and stop")
    return parser


def chosen(names: str | None, parser: argparse.ArgumentParser) -> list[Part]:
    """Return the chosen parts in the table's order. The ceilings are always among them, because all shares refer to
    them."""
    if names is None:
        return list(PARTS)
    wanted = {name.strip() for name in names.split(",")} - {""}
    unknown = wanted - set(BY_NAME)
    if unknown:
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    return [part for part in PARTS if part.name in wanted | {CEILINGS}]


def listing() -> Table:
    found = Table("part", "limit, s", "needs", "what")
    for part in PARTS:
        found.add_row(part.name, str(part.limit), ", ".join(part.needs), part.what)
    return found


if __name__ == "__main__":
    sys.exit(main())
