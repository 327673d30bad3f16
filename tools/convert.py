#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron-Core, exactly or not at all.

    python tools/convert.py hf-to-megatron   HF_FOLDER MEGATRON_FOLDER
    python tools/convert.py megatron-to-hf   MEGATRON_FOLDER HF_FOLDER [--hf FOLDER]
    python tools/convert.py verify           FOLDER FOLDER
    python tools/convert.py inspect          FOLDER
    python tools/convert.py plan             FOLDER          # from config.json alone

A Megatron folder is a torch_dist checkpoint that Megatron-Core loads under any tensor, pipeline or data parallel
layout; a training checkpoint of megatron-chord is one, too (give --hf the model folder it was started from).
Exits with 0 when it did what was asked, 1 when `verify` found a difference, and 2 when something will not do; then
nothing has been written.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_megatron = commands.add_parser("hf-to-megatron", help="Hugging Face folder -> torch_dist checkpoint")
    to_hf = commands.add_parser("megatron-to-hf", help="torch_dist checkpoint -> Hugging Face folder")
    to_hf.add_argument("--hf", type=Path, help="folder with config.json and tokenizer (default: SOURCE/hf)")
    for command in (to_megatron, to_hf):
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
    verify = commands.add_parser(
        "verify", help="are two folders, of either kind, the same model, bit for bit?"
    )
    verify.add_argument("left", type=Path)
    verify.add_argument("right", type=Path)
    inspect = commands.add_parser("inspect", help="list a folder's tensors")
    inspect.add_argument("folder", type=Path)
    plan = commands.add_parser(
        "plan", help="what a config.json asks for: each target tensor with its sources"
    )
    plan.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron_chord.runtime import parallel as runtime

    try:
        return {"verify": _verify, "inspect": _inspect, "plan": _plan}.get(args.command, _convert)(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        runtime.stop()


def _convert(args: argparse.Namespace) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from megatron_chord.convert.directions import hf_to_megatron, megatron_to_hf

    size = sum(file.stat().st_size for file in args.source.glob("*.safetensors")) or sum(
        file.stat().st_size for file in args.source.glob("*.distcp")
    )
    args.target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.target.parent).free
    if size > free:
        raise ValueError(
            f"{args.target.parent} has {free / GB:.1f} GB free, the checkpoint {size / GB:.1f} GB"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(args.command, total=size)

        def progress(written: int) -> None:
            bar.advance(task, written)

        if args.command == "hf-to-megatron":
            hf_to_megatron(args.source, args.target, progress=progress)
        else:
            megatron_to_hf(args.source, args.target, hf=args.hf, progress=progress)
    print(f"{args.target}: {_folder_bytes(args.target) / GB:.3f} GB")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_chord.convert.directions import differences

    found = list(differences(args.left, args.right))
    print("\n".join(found) or "the same model, bit for bit")
    return 1 if found else 0


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    rows = sorted(_tensors(args.folder))
    table = Table(title=str(args.folder))
    for name in ("tensor", "shape", "dtype"):
        table.add_column(name, overflow="fold")
    for name, shape, dtype in rows:
        table.add_row(name, " x ".join(map(str, shape)), str(dtype).removeprefix("torch."))
    Console().print(table)
    print(f"{len(rows)} tensors, {_folder_bytes(args.folder) / GB:.3f} GB on disk")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from megatron_chord.convert.directions import plan_of

    stored = plan_of(args.folder)
    table = Table(title=f"{args.folder}: Megatron-Core's parameters and what each is made of")
    for name in ("parameter", "shape", "Hugging Face tensors"):
        table.add_column(name, overflow="fold")
    for item in stored:
        table.add_row(item.entry.megatron, " x ".join(map(str, item.shape)), "\n".join(item.entry.hf))
    Console().print(table)
    sizes = [math.prod(item.shape) for item in stored]
    print(
        f"{len(stored)} parameters, {sum(sizes):,} numbers, {2 * sum(sizes) / GB:.1f} GB in bf16; the largest "
        f"{2 * max(sizes) / GB:.2f} GB, of which conversion holds two copies"
    )
    return 0


def _tensors(folder: Path) -> list[tuple[str, tuple[int, ...], Any]]:
    from megatron_chord.convert.directions import is_megatron
    from megatron_chord.convert.stream import Checkpoint
    from megatron_chord.weights.reader import HFReader

    if is_megatron(folder):
        return list(Checkpoint(folder).tensors())
    reader = HFReader.of(folder)
    return [(name, reader.shape(name), reader.dtype(name)) for name in reader.names]


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
