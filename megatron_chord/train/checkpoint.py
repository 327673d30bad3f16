"""Checkpoints that are complete or not there, in Megatron-Core's distributed format.

    checkpoints/step-000020/   weights, optimizer and RNG (torch_dist), run.json, manifest.json
    checkpoints/latest         the newest complete one's name

A checkpoint is written to a hidden folder, every file hashed into the manifest, and the folder renamed; ``latest`` is
replaced last. The format reshards: another TP, PP or DP can load it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_chord.runtime import megatron
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.sanity import MARK, check_finite, stored_fault
from megatron_chord.train.state import TrainState

RUN_STATE = "run.json"
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{6,})")

# Megatron-Core's default sharding of optimizer state cannot be loaded ("flattened_range is not supported"), in 0.16.1
# (the default's name is fully_sharded_model_space) and in 0.19.2 (dist_checkpointing/mapping.py:134).
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or damaged."""


def save(state: TrainState, run_state: dict[str, Any], folder: Path, *, keep: int) -> Path:
    """Write ``folder``/step-N for ``run_state["step"]`` = N and drop all but the ``keep`` newest.

    Called on every rank. ``run_state`` (plain JSON: step, cursors, answers sampled ahead) is the coordinator's; other
    ranks' is ignored.

    Raises:
        NonFiniteWeights: nothing was written.
    """
    from megatron.core import dist_checkpointing

    check_finite(state, "no checkpoint was written; --resume auto goes on from the one before")
    groups = state.groups
    name = groups.once(lambda: f"step-{run_state['step']:06d}")
    target, partial = folder / name, folder / f".{name}.partial"

    def make_empty() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    groups.once(make_empty)
    dist_checkpointing.save(
        _sharded(state, is_loading=False),
        str(partial),
        content_metadata=_METADATA
        | {"world_size": groups.world_size, "distributed_optimizer": _has_distributed_optimizer(state)},
    )
    groups.once(lambda: megatron.add_common_file(partial))
    digests = _digest_together(partial, groups)

    def finish() -> None:
        _write(partial / RUN_STATE, json.dumps(run_state | {MARK: True}))
        digests[RUN_STATE] = _digest(partial / RUN_STATE)
        _write(partial / MANIFEST, json.dumps(digests, indent=2, sort_keys=True))
        _sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _write(folder / f".{LATEST}.tmp", name + "\n")
        (folder / f".{LATEST}.tmp").replace(folder / LATEST)
        _sync_folder(folder)
        for old in _complete(folder)[:-keep]:
            if old != target:  # newer ones may be there: damaged, and passed over by find
                shutil.rmtree(old, ignore_errors=True)

    groups.once(finish)
    return target


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in a checkpoint, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def find(folder: Path, notify: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None when there is none at all. Coordinator only.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged: never a silent start from the beginning.
    """
    candidates = _complete(folder)
    for candidate in reversed(candidates):
        fault = _fault(candidate) or stored_fault(candidate, RUN_STATE)
        if fault is None:
            return candidate
        notify(f"checkpoint {candidate} is damaged and passed over: {fault}")
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; move them away to start from the beginning"
        )
    return None


def load(state: TrainState, checkpoint: Path) -> dict[str, Any]:
    """Fill weights, optimizer and RNG from a checkpoint and set the schedule; returns its run state. On every rank.

    RNG states are taken up when the number of ranks is the saved one; nothing in a dense model draws from them.
    """
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        saved_metadata = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
        saved_kind = saved_metadata.get("distributed_optimizer")
        if saved_kind != _has_distributed_optimizer(state):
            raise CheckpointError(
                f"{checkpoint} was written with parallel.distributed_optimizer: {str(saved_kind).lower()}; "
                "its optimizer state cannot be read with another setting"
            )
        same_world = saved_metadata.get("world_size") == state.groups.world_size
        wanted = _sharded(state, is_loading=True)
        if not same_world:
            del wanted["rng"]
        loaded: Any = dist_checkpointing.load(wanted, str(checkpoint))
        for index, chunk in enumerate(state.chunks):
            chunk.module.load_state_dict(loaded[f"model{index}"], strict=True)
        state.optimizer.load_state_dict(loaded["optimizer"])
        _align_steps(state.optimizer)
    if same_world:
        _restore_rng(loaded["rng"])
    run_state = json.loads((checkpoint / RUN_STATE).read_text())
    run_state.pop(MARK, None)
    # The rate is a function of the step and of this run's settings, which a user may have changed on purpose.
    state.scheduler.num_steps = run_state["step"]
    state.scheduler.step(0)
    return run_state


def _has_distributed_optimizer(state: TrainState) -> bool:
    return state.chunks[0].ddp_config.use_distributed_optimizer


def _sharded(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    groups = state.groups
    metadata = dict(_METADATA)  # Megatron puts a process group into it
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(state.chunks)
    }
    # Megatron looks parameters up by the chunks' own dictionaries, or by the only one.
    flat = model if len(model) > 1 else model["model0"]
    return {
        **model,
        "optimizer": state.optimizer.sharded_state_dict(flat, is_loading=is_loading, metadata=metadata),
        "rng": ShardedObject("rng", _rng_state(), (groups.world_size,), (groups.rank,)),
    }


def _align_steps(optimizer: Any) -> None:
    """Give every parameter group Adam's step count.

    Megatron-Core saves rank 0's groups for all ranks, and those that are empty there without a count
    (distrib_optimizer.py; 0.16.1: 655, 0.19.2: 851): experts that the first pipeline stage has none of would begin at
    step 0 again, with the moments of later steps, and be moved much too far.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    groups: list[dict[str, Any]] = [group for one in chained for group in one.optimizer.param_groups]
    step = max((group["step"] for group in groups if "step" in group), default=0)
    for group in groups:
        group["step"] = step


def _rng_state() -> dict[str, Any]:
    rng = {"cpu": torch.get_rng_state(), "tracker": _rng_tracker().get_states()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return rng


def _restore_rng(rng: dict[str, Any]) -> None:
    torch.set_rng_state(rng["cpu"])
    _rng_tracker().set_states(rng["tracker"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _rng_tracker() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def _fault(checkpoint: Path) -> str | None:
    try:
        manifest: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST}: {error}"
    if RUN_STATE not in manifest:
        return f"{MANIFEST} does not name {RUN_STATE}"
    for name, digest in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} has changed since it was written"
    return None


def _digest_together(folder: Path, groups: ParallelGroups) -> dict[str, str]:
    """SHA-256 of every file below ``folder``; the ranks share the reading."""
    names = groups.once(lambda: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    mine = names[groups.rank :: groups.world_size]
    parts = groups.together(lambda: {name: _digest(folder / name) for name in mine})
    return {name: digest for part in parts for name, digest in part.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
