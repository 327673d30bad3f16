#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron-Core, exactly or not at all.

    python tools/convert.py hf-to-megatron        HF_FOLDER MEGATRON_FOLDER
    python tools/convert.py megatron-to-hf        MEGATRON_FOLDER HF_FOLDER [--hf FOLDER]
    python tools/convert.py megatron-to-megatron  MEGATRON_FOLDER MEGATRON_FOLDER [--hf FOLDER]
    python tools/convert.py to-fp8                FOLDER HF_FOLDER [--hf FOLDER]
    python tools/convert.py verify                FOLDER FOLDER [--hf FOLDER] [--dtype DTYPE] [--logits]
    python tools/convert.py inspect               FOLDER
    python tools/convert.py plan                  FOLDER          # from config.json alone

A Megatron folder is a torch_dist checkpoint, which Megatron-Core can load with any tensor, pipeline, expert or data
parallel layout. If a folder has `latest_checkpointed_iteration.txt`, the checkpoint that this file names is used. A
training checkpoint of megatron-chord is a Megatron folder, too. Its model is read from the run's config.yaml, or from
--hf. --dtype rounds all tensors.
`megatron-to-megatron` writes only the model, without optimizer state, one chunk of rows after the other.
`to-fp8` writes 128 x 128 block-quantised weights with their scales, from either kind of folder. vLLM loads them as they
are. The exit code is 0 after success, 1 if `verify` found a difference, and 2 for an error; then nothing was written.
Ctrl-C ends the program at once with 130, SIGTERM with 143, SIGHUP with 129. No file is left then.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_chord.convert.target import discard
from megatron_chord.runtime.megatron import hide_warnings

GB = 1e9
DTYPES = ("float32", "bfloat16", "float16")
HF_HELP = (
    "folder with config.json and tokenizer of a Megatron checkpoint (default: its own hf/, or the model that the run's "
    "config.yaml names)"
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _end_on_signals(getattr(args, "target", None))
    # Everything happens in main memory. If a GPU were visible, Megatron-Core would put the whole model on it and ignore
    # the requested device (tensor_parallel/layers.py:873).
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    hide_warnings()
    from megatron_chord.runtime import parallel as runtime

    commands = {"verify": _verify, "inspect": _inspect, "plan": _plan}
    try:
        return commands.get(args.command, _convert)(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # Python's exit code 1 would mean that two models differ
        traceback.print_exc()
        print("error: a fault of this program, please report it", file=sys.stderr)
        return 2
    finally:
        runtime.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "hf-to-megatron": "Hugging Face folder -> torch_dist checkpoint",
        "megatron-to-hf": "torch_dist checkpoint -> Hugging Face folder",
        "megatron-to-megatron": "torch_dist checkpoint of any layout -> one with only the model",
        "to-fp8": "either kind -> Hugging Face folder with block-quantised FP8 weights",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
        if name != "hf-to-megatron":
            command.add_argument("--hf", type=Path, help=HF_HELP)
        command.add_argument(
            "--dtype",
            choices=DTYPES,
            help="round every tensor to this dtype (default: tensors keep their dtype)",
        )
        command.add_argument(
            "--workers",
            type=_count,
            help="number of threads that read and write (default: one per core, at most 8)",
        )
    verify = commands.add_parser(
        "verify", help="compare two folders of either kind: are they the same model, bit for bit?"
    )
    verify.add_argument("left", type=Path)
    verify.add_argument("right", type=Path)
    verify.add_argument("--hf", type=Path, help=HF_HELP)
    verify.add_argument("--dtype", choices=DTYPES, help="compare what both hold when rounded to it")
    verify.add_argument(
        "--logits",
        action="store_true",
        help="also run both in fp32 on the same tokens, with Transformers and Megatron-Core (needs the memory)",
    )
    commands.add_parser("inspect", help="list a folder's tensors").add_argument("folder", type=Path)
    plan = commands.add_parser(
        "plan", help="list the tensors of the model in a config.json, each with its sources"
    )
    plan.add_argument("folder", type=Path)
    return parser


def _convert(args: argparse.Namespace) -> int:
    from megatron_chord.convert.directions import to_hf, to_megatron
    from megatron_chord.convert.sources import HFSource, open_source

    source = open_source(args.source, getattr(args, "hf", None), dtype=_dtype(args.dtype))
    is_megatron = not isinstance(source, HFSource)
    if args.command != "to-fp8" and is_megatron != args.command.startswith("megatron"):
        kind = "a distributed checkpoint" if is_megatron else "a Hugging Face folder"
        raise ValueError(f"{args.source} is {kind}, which {args.command} does not accept")
    left_out = source.left_out if isinstance(source, HFSource) else []
    if left_out:
        print(
            f"left out, because they do not belong to the model: {len(left_out)} tensors ({left_out[0]}, ...)"
        )
    size = sum(stored.size(source.dtype) for stored in source.layout.parameters)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.target.parent).free
    if size > free:
        raise ValueError(
            f"{args.target.parent} has {free / GB:.1f} GB free, the checkpoint {size / GB:.1f} GB"
        )
    with _progress(args.command, size) as progress:
        if args.command.endswith("to-megatron"):
            to_megatron(source, args.target, progress=progress, notify=_warn, workers=args.workers)
        else:
            fp8 = args.command == "to-fp8"
            to_hf(source, args.target, fp8=fp8, progress=progress, notify=_warn, workers=args.workers)
    print(f"{args.target}: {_folder_bytes(args.target) / GB:.3f} GB")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_chord.convert.directions import differences
    from megatron_chord.convert.sources import checkpoint_of, open_source
    from megatron_chord.weights.findings import listing

    sides = [checkpoint_of(folder) for folder in (args.left, args.right)]
    is_plain = [(side / "config.json").is_file() for side in sides]
    if args.hf is not None and all(is_plain):
        raise ValueError("--hf is for a Megatron checkpoint: both folders have a config.json of their own")
    left, right = (
        open_source(side, None if plain else args.hf, dtype=_dtype(args.dtype))
        for side, plain in zip(sides, is_plain, strict=True)
    )
    size = sum(stored.size(left.dtype) for stored in left.layout.parameters if stored.entry.rule.exported)
    with _progress("verify", size) as progress:
        found = list(differences(left, right, progress=progress))
    same = "the same model, bit for bit" + (f", in {args.dtype}" if args.dtype else "")
    print(listing(f"{len(found)} differences:", found) if found else same)
    if args.logits and not _same_logits(left, right):
        return 1
    return 1 if found else 0


def _same_logits(left: Any, right: Any) -> bool:
    from megatron_chord.convert.logits import TOLERANCE, logit_differences, logits_of, sample_tokens

    if left.shape.vocab_size != right.shape.vocab_size:
        return False
    tokens = sample_tokens(left.shape.vocab_size)
    one, other = logits_of(left, tokens), logits_of(right, tokens)
    largest, agreeing = logit_differences(one, other)
    magnitude = one.abs().max().item()
    print(
        f"logits of {len(tokens)} tokens in fp32 differ by at most {largest:.1e} (they reach {magnitude:.1f}); "
        f"the most likely token is the same at {100 * agreeing:.1f} % of positions"
    )
    return largest <= TOLERANCE * max(1.0, magnitude)


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
        f"{2 * max(sizes) / GB:.2f} GB, which an export holds once"
    )
    return 0


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _tensors(folder: Path) -> list[tuple[str, tuple[int, ...], Any]]:
    from megatron_chord.convert.sources import checkpoint_of
    from megatron_chord.weights.reader import HFReader
    from megatron_chord.weights.torch_dist import METADATA, Checkpoint

    folder = checkpoint_of(folder)
    if (folder / METADATA).is_file():
        return list(Checkpoint(folder).tensors())
    reader = HFReader.of(folder)
    return [(name, reader.shape(name), reader.dtype(name)) for name in reader.names]


def _end_on_signals(target: Path | None) -> None:
    """On a signal: remove ``target``, print one line, and exit with 128 + the number of the signal.

    The handler ends the process itself. An exception would wait for the threads, be wrapped by torch, or be lost in a
    place where Python ignores it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    was_there = target is not None and target.exists()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        line = f"ended by {signal.Signals(number).name}"
        if target is not None and not was_there:
            discard(target)
            line += f": {target} is complete" if target.exists() else f": {target} has not been written"
        show_cursor = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
        os.write(2, f"{show_cursor}{line}\n".encode())
        os._exit(128 + number)

    for number in numbers:
        signal.signal(number, end)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


@contextmanager
def _progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with GB/s on a terminal. Yields the function that advances it, which any thread may call."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=size)
        yield lambda done: bar.advance(task, done)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
