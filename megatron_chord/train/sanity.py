"""Checks that weights are finite: before every checkpoint and export, and in checkpoints that were never checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.train.state import TrainState, parts_of
from megatron_chord.weights.torch_dist import Box, Checkpoint

MARK = "finite"
"""Key in a checkpoint's run.json: true if this module has checked the saved state."""
_PIECE = 2**26
"""Number of elements of a stored tensor that are read at a time."""
_SHOWN = 5


class NonFiniteWeights(RuntimeError):
    """Weights or optimizer state are NaN or infinite."""


def check_finite(state: TrainState, consequence: str, *, with_optimizer: bool = True) -> None:
    """Check that every weight of every rank is finite; with ``with_optimizer`` also main weights and moments.

    Called on every rank. It reads this rank's memory once, makes one all-reduce over all ranks and waits for the device
    once.

    Raises:
        NonFiniteWeights: on every rank, with the names of some tensors and ``consequence``.
    """
    tensors = dict(state.weights())
    if with_optimizer:
        tensors |= dict(_optimizer_tensors(state))
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel() > 0}
    broken = torch.zeros(len(tensors), dtype=torch.bool, device=state.groups.device)
    if tensors:
        # The largest absolute value of each tensor; NaN if the tensor has a NaN.
        sizes = torch._foreach_norm(list(tensors.values()), math.inf)
        broken = torch.stack([size.float() for size in sizes]).isfinite().logical_not()
    total = broken.sum(dtype=torch.float32)
    dist.all_reduce(total)
    if total.item() == 0:
        return
    mine = [name for name, is_broken in zip(tensors, broken.tolist(), strict=True) if is_broken]
    names = list(dict.fromkeys(name for part in state.groups.gather(mine) for name in part))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise NonFiniteWeights(f"not all numbers are finite in {', '.join(names[:_SHOWN])}{more}; {consequence}")


def stored_fault(checkpoint: Path, run_state: str) -> str | None:
    """Check a checkpoint of an older version, which has no mark in the file ``run_state``. Returns the fault or None.

    Reads all of its tensors in parts. Called on one rank.
    """
    try:
        if json.loads((checkpoint / run_state).read_text()).get(MARK) is True:
            return None
        stored = Checkpoint(checkpoint)
        broken = [
            key
            for key, shape, dtype in stored.tensors()
            if dtype.is_floating_point and not _is_finite(stored, key, shape, dtype)
        ]
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    if not broken:
        return None
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return f"not all numbers are finite in {', '.join(broken[:_SHOWN])}{more}"


def _is_finite(stored: Checkpoint, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    if 0 in shape:
        return True
    rows = max(1, _PIECE // math.prod(shape[1:])) if shape else 1
    for start in range(0, shape[0] if shape else 1, rows):
        part = (min(rows, shape[0] - start), *shape[1:]) if shape else ()
        offset = (start, *(0 for _ in shape[1:])) if shape else ()
        into = torch.empty(part, dtype=dtype)
        stored.read(Box(key=key, offset=offset, shape=part, whole=shape, dtype=dtype), into)
        if not into.isfinite().all():
            return False
    return True


def _optimizer_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    """Main weights and moments of this rank, with numbered names, because the parameters' names are not known here."""
    for part in parts_of(state.optimizer):
        inner = part.optimizer
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            held = {"main weight": parameter.data, **inner.state.get(parameter, {})}
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and tensor.dtype in (
                    torch.float32,
                    torch.bfloat16,
                    torch.float16,
                ):
                    yield f"the optimizer's {name} {index}", tensor
