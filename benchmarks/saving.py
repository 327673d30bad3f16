"""Measures the host memory that saving and loading a checkpoint need, and how long training waits for a save.

    python benchmarks/saving.py --ranks 4

Prints for each data-parallel rank the peak of its resident memory above that before, and the bytes that it wrote. In
comparison: the peak of Megatron-Core's own description of the state, which gathers the optimizer's state on every rank.

Then it trains the same steps three times in the same processes: without a checkpoint, with one for which training
waits, and with one that is written while training goes on (checkpoint.asynchronous).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared import circumstances, in_ranks, reset_high_water_mark, resident, save_qwen2

STEPS, SAVED = 9, 2
"""Steps of each training, and after how many of them a checkpoint is saved."""
TRAININGS = ("no checkpoint", "training waits", "training goes on")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measure(model: Path, out: Path) -> dict[str, Any]:
    """Run in every rank: update once, so that Adam has moments, then describe as Megatron does, then save."""
    import torch

    from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
    from megatron_chord.families.table import read_shape
    from megatron_chord.runtime import parallel as runtime
    from megatron_chord.train import checkpoint
    from megatron_chord.train.state import build_state
    from megatron_chord.train.update import apply_gradients

    parallel = ParallelConfig()
    groups = runtime.start(parallel, seed=0)
    state = build_state(
        read_shape(model), ModelConfig(path=model), parallel, OptimConfig(lr=1e-3), groups=groups, steps=2
    )
    for chunk in state.chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(1e-3)
    apply_gradients(state)
    parameters = sum(one.numel() for chunk in state.chunks for one in chunk.parameters())

    def save() -> None:
        checkpoint.save(state, {"step": 1}, out, keep=1)

    def gather() -> None:
        metadata: dict[str, Any] = {"distrib_optim_sharding_type": "fully_reshardable"}
        (chunk,) = state.chunks
        weights = chunk.module.sharded_state_dict(metadata=dict(metadata))
        state.optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)

    rows: dict[str, Any] = {"parameters": parameters}

    def load() -> None:
        checkpoint.load(state, out / "step-000001")

    for name, action in (("save", save), ("gather", gather), ("load", load)):
        torch.distributed.barrier()
        before = resident("VmRSS")
        reset_high_water_mark()
        start = time.monotonic()
        action()
        rows[f"{name}_s"] = time.monotonic() - start
        rows[f"{name}_bytes"] = resident("VmHWM") - before
    written = out.glob(f"step-*/__{groups.rank}_*")
    rows["written_bytes"] = sum(path.stat().st_size for path in written)
    rows["trainings"] = {name: train(state, out / name.replace(" ", "-"), name) for name in TRAININGS}
    return rows


def train(state: Any, out: Path, name: str) -> dict[str, Any]:
    """Train with at most one checkpoint. Returns the seconds of each step, of saving, and until it has its name."""
    from megatron_chord.config import CheckpointConfig, ParallelConfig
    from megatron_chord.train.saver import Saver
    from megatron_chord.train.update import apply_gradients
    from tests.distributed.steps import packing_layout
    from tests.distributed.test_checkpoint import gradients

    layout = packing_layout(state.shape, ParallelConfig(), state.groups.data.size)
    asynchronous = name == "training goes on"
    said: list[float] = []
    saver = Saver(
        out,
        CheckpointConfig(asynchronous=asynchronous),
        state.groups,
        lambda text: said.append(time.monotonic()),
    )
    seconds, saving_s, saved_at = [], 0.0, 0.0
    begun = time.monotonic()
    for step in range(STEPS):
        start = time.monotonic()
        saver.settle(state.groups.gather(saver.progress))
        gradients(state, layout, step)
        apply_gradients(state)
        if step + 1 == SAVED and name != "no checkpoint":
            saved_at = time.monotonic()
            saver.save(state, {"step": SAVED}, best=None)
            saving_s = time.monotonic() - saved_at
        seconds.append(time.monotonic() - start)
    saver.wait()
    whole_s = time.monotonic() - begun
    return {
        "steps": seconds,
        "saving_s": saving_s,
        "named_s": [at - saved_at for at in said],
        "whole_s": whole_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--inside", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(*args.inside)))
        return
    os.environ |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        model, out = Path(name) / "model", Path(name) / "out"
        save_qwen2(model, hidden=args.hidden, layers=args.layers, vocab=args.vocab)
        command = [sys.executable, __file__, "--inside", str(model), str(out)]
        rows = in_ranks(command, args.ranks)
    count = rows[0]["parameters"]
    print(f"{count / 1e6:.1f} million parameters, {args.ranks} data-parallel ranks")
    print("       save:                                           Megatron's gathering:              load:")
    print(
        "rank   peak MB   bytes/parameter   written MB      s   peak MB   bytes/parameter      s   peak MB"
        "   bytes/parameter      s"
    )
    for rank, row in enumerate(rows):
        print(
            f"{rank:4}   {row['save_bytes'] / 1e6:7.0f}   {row['save_bytes'] / count:15.2f}"
            f"   {row['written_bytes'] / 1e6:10.0f}   {row['save_s']:4.1f}"
            f"   {row['gather_bytes'] / 1e6:7.0f}   {row['gather_bytes'] / count:15.2f}   {row['gather_s']:4.1f}"
            f"   {row['load_bytes'] / 1e6:7.0f}   {row['load_bytes'] / count:15.2f}   {row['load_s']:4.1f}"
        )
    print()
    print(f"{STEPS} steps, a checkpoint after {SAVED}:")
    print(
        "                   all steps s   median step s   step with the save s   save s   until it has its name s"
    )
    for name, found in rows[0]["trainings"].items():
        steps, named = found["steps"], found["named_s"]
        saving = (
            f"{found['saving_s']:6.2f}   {named[0]:23.2f}" if named else "     -                         -"
        )
        print(
            f"{name:16}   {found['whole_s']:11.2f}   {statistics.median(steps):13.2f}   {steps[SAVED - 1]:20.2f}"
            f"   {saving}"
        )
    print(circumstances())


if __name__ == "__main__":
    main()
