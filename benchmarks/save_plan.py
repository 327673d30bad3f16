"""Times the check that the parts which all ranks write of a checkpoint contain each element exactly once.

    python benchmarks/save_plan.py [--layers 8 16 80] [--limit 16]

The parts are those of Adam's first moment of Llama-3.1-70B, cut to fewer layers where ``--layers`` says so. Each rank
of a data-parallel group keeps a range of Megatron-Core's flat buffers. No model is built. Main weights and the second
moment have the same parts, so a save takes three times as long.

    torch   the check that torch's distributed checkpoints make of a save (``_validate_global_plan``); left out above
            ``--limit`` layers
    ours    ``torch_dist.is_tiling``
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from shared import circumstances
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from megatron_chord.train.optimizer_shares import within
from megatron_chord.weights.torch_dist import is_tiling

HIDDEN, MLP, QKV, VOCABULARY = 8192, 28672, 10240, 128256
Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    tensor: int
    pipeline: int
    data: int

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}"


@dataclass(frozen=True)
class Local:
    """A parameter of a rank: which box of which tensor it is, and the views of it that are saved by themselves."""

    key: str
    shape: tuple[int, int]
    places: tuple[tuple[int, tuple[int, ...]], ...]
    """First row of each view in the parameter, and the view's offset in the tensor. Views have equally many rows."""


def parameters(layout: Layout, tensor: int, stage: int, layers: int) -> Iterator[Local]:
    """The matrices of a rank. Norms have 0.002 % of the elements and are left out."""
    of_stage = layers // layout.pipeline
    if stage == 0:
        rows = VOCABULARY // layout.tensor
        yield Local("embedding", (rows, HIDDEN), ((0, (tensor * rows, 0)),))
    for layer in range(stage * of_stage, (stage + 1) * of_stage):
        rows = QKV // layout.tensor
        yield Local("qkv", (rows, HIDDEN), ((0, (layer, tensor * rows, 0)),))
        columns = HIDDEN // layout.tensor
        yield Local("proj", (HIDDEN, columns), ((0, (layer, 0, tensor * columns)),))
        rows = MLP // layout.tensor  # gate and up are halves of one parameter
        yield Local(
            "fc1",
            (2 * rows, HIDDEN),
            ((0, (layer, tensor * rows, 0)), (rows, (layer, MLP + tensor * rows, 0))),
        )
        columns = MLP // layout.tensor
        yield Local("fc2", (HIDDEN, columns), ((0, (layer, 0, tensor * columns)),))
    if stage == layout.pipeline - 1:
        rows = VOCABULARY // layout.tensor
        yield Local("output", (rows, HIDDEN), ((0, (tensor * rows, 0)),))


def parts(layout: Layout, layers: int) -> dict[str, Boxes]:
    """The boxes that all ranks write, by tensor."""
    found: dict[str, Boxes] = defaultdict(list)
    bucket = max(40_000_000, 1_000_000 * layout.data)  # Megatron-Core's default
    for stage in range(layout.pipeline):
        for tensor in range(layout.tensor):
            buckets: list[list[Local]] = [[]]
            size = 0
            for local in parameters(layout, tensor, stage, layers):
                buckets[-1].append(local)
                size += local.shape[0] * local.shape[1]
                if size >= bucket:
                    buckets.append([])
                    size = 0
            for locals_ in buckets:
                share = -(-sum(one.shape[0] * one.shape[1] for one in locals_) // layout.data)
                for rank in range(layout.data):
                    start = 0
                    for local in locals_:
                        cut(local, rank * share - start, (rank + 1) * share - start, found[local.key])
                        start += local.shape[0] * local.shape[1]
    return found


def cut(local: Local, low: int, high: int, into: Boxes) -> None:
    rows, columns = local.shape[0] // len(local.places), local.shape[1]
    for first, place in local.places:
        skipped = first * columns
        for offset, shape in within((rows, columns), (columns, 1), low - skipped, high - skipped):
            stacked = place[:-2]
            at = (place[-2] + offset[0], place[-1] + offset[1])
            into.append(((*stacked, *at), ((1,) * len(stacked) + shape)))


def whole(key: str, layers: int) -> tuple[int, ...]:
    return {
        "embedding": (VOCABULARY, HIDDEN),
        "output": (VOCABULARY, HIDDEN),
        "qkv": (layers, QKV, HIDDEN),
        "proj": (layers, HIDDEN, HIDDEN),
        "fc1": (layers, 2 * MLP, HIDDEN),
        "fc2": (layers, HIDDEN, MLP),
    }[key]


def by_torch(boxes: dict[str, Boxes], layers: int) -> None:
    described: dict[str, Any] = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size(whole(key, layers)),
            [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for offset, shape in found],
        )
        for key, found in boxes.items()
    }
    errors = _validate_global_plan([SavePlan([]), SavePlan([])], Metadata(described))
    assert not errors, errors[:3]


def by_us(boxes: dict[str, Boxes], layers: int) -> None:
    assert all(is_tiling(whole(key, layers), found) for key, found in boxes.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 80])
    parser.add_argument("--limit", type=int, default=16)
    args = parser.parse_args()
    print("layout            layers      parts   torch s   ours s")
    for layout in (Layout(4, 4, 4), Layout(8, 1, 64)):
        for layers in args.layers:
            boxes = parts(layout, layers)
            count = sum(len(found) for found in boxes.values())
            seconds = []
            for check in (by_torch, by_us):
                start = time.monotonic()
                if check is by_us or layers <= args.limit:
                    check(boxes, layers)
                    seconds.append(f"{time.monotonic() - start:7.2f}")
                else:
                    seconds.append("      -")
            print(f"{layout!s:16}   {layers:5}   {count:8}   {seconds[0]}  {seconds[1]}", flush=True)
    print(circumstances())


if __name__ == "__main__":
    main()
