"""Atomic checkpoints in Megatron-Core's distributed format: a checkpoint is either complete or does not exist.

    checkpoints/step-000020/   weights, optimizer and RNG (torch_dist), run.json, manifest.json; with router replay
                               also the routes of kept answers, routes.safetensors
    .../second_optimizer/      the optimizer in the state of extra updates (``train.second_adam``), if there are any
    .../averaged_optimizer/    the optimizer with averaged weights (``train.averaged``), if a teacher has them
    checkpoints/latest         the newest complete one's name

A checkpoint is first written to a hidden folder, by threads of all ranks. When all files are on the disk, the manifest
gets the hash of every file. Then the folder is renamed, and ``latest`` is replaced last. The format reshards: a run
with another TP, PP or DP size can load it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from megatron_chord.files import sync_path, write_durably
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.te_build import available_memory
from megatron_chord.train import sharded
from megatron_chord.train.arrays import read_arrays, with_arrays_of, without_arrays, write_arrays
from megatron_chord.train.folder import LATEST
from megatron_chord.train.optimizer_shares import Shares, described_only
from megatron_chord.train.sanity import MARK, check_finite, stored_fault
from megatron_chord.train.state import TrainState, parts_of
from megatron_chord.weights.torch_dist import (
    COMMON,
    COMMON_FILES,
    METADATA,
    Checkpoint,
    Written,
    load_plain,
    reason,
    write_common,
    write_description,
    write_part,
)

T = TypeVar("T")

RUN_STATE = "run.json"
ROUTES = "routes.safetensors"
MANIFEST = "manifest.json"
SECOND = "second_optimizer"
AVERAGED = "averaged_optimizer"
_PARTIAL = ".partial"
_ASIDE = ".set-aside"
_NAME = re.compile(r"step-(\d{6,})")
_FILES = 2
"""Number of files that each rank writes in parallel."""
_READERS = 4
"""Number of files that a rank reads in parallel, because hashing a single file is slower than most disks."""
_READ_BYTES = 2**20
_REPORT_S = 10.0
_MOST_MEMORY = 0.8
"""Share of a node's free main memory that copies of the state may take."""

Progress = Literal["writing", "written", "failed"]
Part = tuple[dict[str, Written], dict[str, str | None]]
"""What a rank has written, by folder in the checkpoint, and the digests of its files by name."""

# Megatron-Core's default sharding of optimizer state cannot be loaded ("flattened_range is not supported"), in 0.16.1
# (the default's name is fully_sharded_model_space) and in 0.19.2 (dist_checkpointing/mapping.py:134).
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or damaged."""


def save(
    state: TrainState,
    run_state: dict[str, Any],
    folder: Path,
    *,
    keep: int,
    best: int | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """Write ``folder``/step-N for ``run_state["step"]`` = N. Remove all checkpoints except the ``keep`` newest and step
    ``best``.

    Called on every rank. Only the coordinator's ``run_state`` is used (plain JSON: step, cursors, answers sampled
    ahead; the routes in it are arrays). ``notify`` gets a message for each old checkpoint that cannot be removed.

    Raises:
        NonFiniteWeights: a number is not finite; nothing was written.
        OSError: on every rank, if writing failed on any rank. The partial files are removed.
    """
    return begin(state, run_state, folder, keep=keep, best=best, notify=notify).finish()


def begin(
    state: TrainState,
    run_state: dict[str, Any],
    folder: Path,
    *,
    keep: int,
    best: int | None = None,
    notify: Callable[[str], None] = print,
    may_stage: bool = False,
) -> Writing:
    """Begin to write a checkpoint; the arguments are those of ``save``. Called on every rank.

    With ``may_stage`` the state is first copied to main memory, if every node has enough of it and all copies succeed.
    Then training may go on before ``finish``; otherwise the state must not change until then.

    Raises:
        NonFiniteWeights: a number is not finite; nothing was written.
    """
    check_finite(state, "no checkpoint was written; --resume auto continues from the previous one")
    groups = state.groups
    plain, arrays = without_arrays(run_state)
    place = _Place(
        folder=folder,
        name=groups.once(lambda: f"step-{run_state['step']:06d}"),
        run_state=json.dumps(plain | {MARK: True}).encode(),
        arrays=arrays,
        keep=keep,
        best=best,
        notify=notify,
    )
    groups.once(place.make_empty)
    try:
        contents = _described(state)
        boxes = contents[""][0]
        needed = sum(box.num_bytes for box in boxes)
        is_staged = may_stage and _has_room(groups, needed, notify) and _stage(groups, boxes, notify)
    except BaseException:
        if groups.is_coordinator:
            place.remove_partial()
        raise
    return Writing(groups, place, contents, is_staged=is_staged)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The folder to which a checkpoint is written. Its methods are called only on the coordinator."""

    folder: Path
    name: str
    run_state: bytes
    arrays: Sequence[np.ndarray]
    """The arrays of the run state, which is JSON without them."""
    keep: int
    best: int | None
    notify: Callable[[str], None]

    @property
    def partial(self) -> Path:
        return self.folder / f".{self.name}{_PARTIAL}"

    @property
    def target(self) -> Path:
        return self.folder / self.name

    def make_empty(self) -> None:
        self.remove_partial()
        self.partial.mkdir(parents=True)

    def remove_partial(self) -> None:
        """Free the space, in case the disk is full."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def complete(self, parts: Sequence[Part]) -> None:
        """Describe the files of all ranks, give the folder its name, and remove old checkpoints."""
        inners = list(parts[0][0])
        for inner in inners:
            write_description(self.partial / inner, [written[inner] for written, _ in parts])
            sync_path(self.partial / inner)
        digests = {name: digest for _, found in parts for name, digest in found.items()}
        write_durably(self.partial / RUN_STATE, self.run_state)
        names = [RUN_STATE, *(str(Path(inner, METADATA)) for inner in inners)]
        if self.arrays:
            write_arrays(self.partial / ROUTES, self.arrays)
            names.append(ROUTES)
        digests |= {name: _digest(self.partial / name) for name in names}
        write_durably(self.partial / MANIFEST, json.dumps(digests, indent=2, sort_keys=True).encode())
        sync_path(self.partial)
        shutil.rmtree(self.target, ignore_errors=True)
        self.partial.rename(self.target)
        _write_latest(self.folder, self.name)
        sync_path(self.folder)
        for old in _complete(self.folder)[: -self.keep]:
            # Damaged newer checkpoints, which `find` has skipped, may exist.
            if old != self.target and step_of(old) != self.best:
                _drop(old, self.notify)


class Writing:
    """A checkpoint that threads of this process write, each rank its part. No collectives until ``finish``."""

    def __init__(
        self,
        groups: ParallelGroups,
        place: _Place,
        contents: Mapping[str, sharded.Content],
        *,
        is_staged: bool,
    ) -> None:
        """Start to write.

        Args:
            contents: what this rank writes, by folder in the checkpoint.
            is_staged: whether the state may change before ``finish``.
        """
        self.is_staged = is_staged
        self._groups, self._place = groups, place
        self._given_up = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._part = self._pool.submit(self._write, contents)
        self._pool.shutdown(wait=False)

    @property
    def progress(self) -> Progress:
        """The progress of this rank's part."""
        if not self._part.done():
            return "writing"
        return "written" if self._part.exception() is None else "failed"

    def finish(self) -> Path:
        """Wait until all ranks have written, then give the checkpoint its name. Called on every rank.

        Raises:
            OSError: on every rank, if writing failed on any rank. The partial files are removed.
        """
        groups = self._groups
        try:
            groups.together(self._wait)
            parts = groups.to_coordinator(self._part.result())
            groups.once(lambda: self._place.complete(parts))
        except BaseException:
            self.give_up()
            raise
        return self._place.target

    def fail(self) -> None:
        """Raise the error of a rank whose ``progress`` is "failed". Other ranks stop writing. Called on every rank.

        Raises:
            OSError: on every rank. The partial files are removed.
        """
        has_failed = self.progress == "failed"
        self._given_up.set()
        wait([self._part])
        try:
            self._groups.together(lambda: self._wait() if has_failed else None)
        finally:
            self.give_up()

    def give_up(self) -> None:
        """End the threads of this process, and remove the partial files on the coordinator. No collectives."""
        self._given_up.set()
        wait([self._part])
        if self._groups.is_coordinator:
            self._place.remove_partial()

    def _wait(self) -> None:
        self._part.result()

    def _write(self, contents: Mapping[str, sharded.Content]) -> Part:
        """Write this rank's files."""
        groups, partial = self._groups, self._place.partial
        found: dict[str, Written] = {}
        names: list[str] = []
        for inner, (boxes, objects, common) in contents.items():
            found[inner] = write_part(
                partial / inner,
                boxes,
                objects=objects,
                files=_FILES,
                rank=groups.rank,
                is_given_up=self._given_up.is_set,
            )
            files = list(found[inner].files)
            if groups.is_coordinator:
                write_common(partial / inner, common)
                files += COMMON_FILES
            names += [str(Path(inner, name)) for name in files]
        with ThreadPoolExecutor(_READERS) as pool:
            digests = pool.map(lambda name: _digest(partial / name), names)
            return found, dict(zip(names, digests, strict=True))


def staged(boxes: sharded.Boxes) -> sharded.Boxes:
    """Copies of the boxes' data in main memory. Each copy is freed when it was written.

    Pageable memory: pinning it would take longer than the copy does, and CUDA keeps pinned memory for itself.
    """
    copies = {
        box: torch.empty(box.shape, dtype=box.dtype).copy_(data().reshape(box.shape))
        for box, data in boxes.items()
    }
    return {box: functools.partial(copies.pop, box) for box in boxes}


def _has_room(groups: ParallelGroups, needed: int, notify: Callable[[str], None]) -> bool:
    """True if every node has enough main memory for the copies of its ranks. This rank needs ``needed`` bytes. Called
    on every rank."""
    ranks: list[tuple[str, int, int]] = groups.gather((socket.gethostname(), needed, available_memory()))
    for node in dict.fromkeys(node for node, _, _ in ranks):
        wanted = sum(size for name, size, _ in ranks if name == node)
        free = min(free for name, _, free in ranks if name == node)
        if wanted > _MOST_MEMORY * free:
            if groups.is_coordinator:
                notify(
                    f"training waits for this checkpoint: copies in main memory need {wanted / 1e9:.1f} GB on {node}, "
                    f"which has {free / 1e9:.1f} GB left (checkpoint.asynchronous)"
                )
            return False
    return True


def _stage(groups: ParallelGroups, boxes: sharded.Boxes, notify: Callable[[str], None]) -> bool:
    """Replace the data of ``boxes`` by copies (``staged``). Called on every rank. One collective.

    Returns:
        whether it succeeded on all ranks. If not, no rank has copies, and its boxes are as before.
    """
    copies: sharded.Boxes = {}
    failure: str | None = None
    try:
        copies = staged(boxes)
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises RuntimeError
        failure = f"rank {groups.rank} on {socket.gethostname()}: {reason(error)}"
    failures = [found for found in groups.gather(failure) if found is not None]
    if not failures:
        boxes.update(copies)
    elif groups.is_coordinator:
        notify(
            f"training waits for this checkpoint, because it could not be copied to main memory: {failures[0]}"
        )
    return not failures


def _write_latest(folder: Path, name: str) -> None:
    write_durably(folder / f".{LATEST}.tmp", f"{name}\n".encode())
    (folder / f".{LATEST}.tmp").replace(folder / LATEST)


def clear_partial(folder: Path, notify: Callable[[str], None]) -> None:
    """Remove checkpoints that a killed run left unfinished. No other run may write to ``folder`` at the same time."""
    for path in folder.glob(f".step-*{_PARTIAL}"):
        _drop(path, notify)


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps of a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


@dataclass(frozen=True)
class Alone:
    """The part of ``ParallelGroups`` that ``find`` needs, for a single process."""

    rank: int = 0
    world_size: int = 1

    def once(self, compute: Callable[[], T]) -> T:
        return compute()

    def together(self, action: Callable[[], T]) -> list[T]:
        return [action()]


def find(folder: Path, notify: Callable[[str], None], groups: ParallelGroups | Alone) -> Path | None:
    """The newest undamaged checkpoint, or None if there is no checkpoint at all. Called on every rank.

    Ranks and their threads share the work of reading. An older checkpoint is read only if all newer ones are damaged.
    Only the coordinator's ``notify`` is used.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged. A silent start from step 0 would lose the run.
    """
    candidates = groups.once(lambda: _complete(folder))
    for candidate in reversed(candidates):
        fault = _fault(candidate, notify, groups)
        if fault is None:
            fault = groups.once(functools.partial(stored_fault, candidate, RUN_STATE))
        if fault is None:
            return candidate
        if groups.rank == 0:
            notify(f"checkpoint {candidate} is damaged and was skipped: {fault}")
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged; move them away to start from the beginning"
        )
    return None


def find_named(
    folder: Path, name: str, notify: Callable[[str], None], groups: ParallelGroups | Alone
) -> Path:
    """The checkpoint with this name (``step-40`` is ``step-000040``), checked as by ``find``. On every rank.

    Raises:
        ValueError: there is no checkpoint with this name.
        CheckpointError: it is damaged.
    """
    candidates = groups.once(lambda: _complete(folder))
    number = re.fullmatch(r"step-(\d+)", name)
    wanted = [path for path in candidates if number is not None and step_of(path) == int(number[1])]
    if not wanted:
        known = ", ".join(path.name for path in candidates) or "none"
        raise ValueError(f"there is no checkpoint {name} in {folder}; there are: {known}")
    fault = _fault(wanted[0], notify, groups)
    if fault is None:
        fault = groups.once(functools.partial(stored_fault, wanted[0], RUN_STATE))
    if fault is not None:
        raise CheckpointError(f"checkpoint {wanted[0]} is damaged: {fault}")
    return wanted[0]


def set_aside(folder: Path, *, after: int, notify: Callable[[str], None]) -> None:
    """Rename the checkpoints with more than ``after`` steps, so that a later start does not use them for this run.

    The new name ends with ``.set-aside``, or with ``.set-aside-2`` and so on if there is such a checkpoint already.
    """
    for path in _complete(folder):
        if step_of(path) > after:
            aside = _free_name(path.with_name(f"{path.name}{_ASIDE}"))
            path.rename(aside)
            notify(
                f"checkpoint {path.name} is kept as {aside.name}, because the run continues from an earlier step"
            )
        elif step_of(path) == after:
            _write_latest(folder, path.name)


def _free_name(path: Path) -> Path:
    """``path``, or the first of ``path``-2, ``path``-3, ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


def load(state: TrainState, checkpoint: Path) -> dict[str, Any]:
    """Load weights, optimizer and RNG from a checkpoint and set the schedule. Returns its run state. On every rank.

    RNG states are restored only if the number of ranks is the same as in the checkpoint. Training a dense model uses no
    random numbers. Nothing in the checkpoint is executed: every object is read as plain data.

    Raises:
        CheckpointError: on every rank, if a file cannot be read, contains more than plain data, or does not fit the
            model.
    """
    groups = state.groups
    with torch.no_grad():
        reader, common = _together(groups, lambda: _open(checkpoint))
        saved_metadata = common.get("content_metadata") or {}
        saved_kind = saved_metadata.get("distributed_optimizer")
        if saved_kind != _has_distributed_optimizer(state):
            raise CheckpointError(
                f"{checkpoint} was written with parallel.distributed_optimizer: {str(saved_kind).lower()}; "
                "its optimizer state cannot be read with another setting"
            )
        same_world = saved_metadata.get("world_size") == groups.world_size
        with described_only(state.optimizer) as shares:
            wanted = _sharded(state, is_loading=True)
            if not same_world:
                del wanted["rng"]
            loaded, kept = _together(groups, lambda: sharded.fill(wanted, reader, common, shares))
            run_state = _together(groups, lambda: _run_state(checkpoint, with_arrays=groups.is_coordinator))
            for index, chunk in enumerate(state.chunks):
                chunk.module.load_state_dict(loaded[f"model{index}"], strict=True)
            state.optimizer.load_state_dict(loaded["optimizer"])
        _together(groups, lambda: sharded.read_shares(reader, kept))
        _align_steps(state.optimizer)
        if state.second is not None:
            _load_other(state, state.second.active(), checkpoint / SECOND)
        if state.averaged is not None and not _load_other(
            state, state.averaged.exchanged(), checkpoint / AVERAGED
        ):
            state.averaged.restart()
    if same_world:
        _restore_rng(loaded["rng"])
    run_state.pop(MARK, None)
    # The learning rate follows from the step and from this run's settings, which the user may have changed on purpose.
    state.scheduler.num_steps = run_state["step"]
    state.scheduler.step(0)
    return run_state


def _load_other(state: TrainState, other: AbstractContextManager[None], folder: Path) -> bool:
    """Load a further optimizer state. Inside the context manager ``other``, the optimizer holds this state.

    Returns True if the checkpoint has this state. A checkpoint of a run with another method does not have it.
    """
    groups = state.groups
    if not groups.once(folder.is_dir):
        return False
    reader, common = _together(groups, lambda: _open(folder))
    with other:
        with described_only(state.optimizer) as shares:
            wanted = {"optimizer": _sharded(state, is_loading=True)["optimizer"]}
            loaded, kept = _together(groups, lambda: sharded.fill(wanted, reader, common, shares))
            state.optimizer.load_state_dict(loaded["optimizer"])
        _together(groups, lambda: sharded.read_shares(reader, kept))
        _align_steps(state.optimizer)
    return True


def _described(state: TrainState) -> dict[str, sharded.Content]:
    """Describe weights, optimizer and RNG in the layout of Megatron-Core's ``dist_checkpointing.save``.

    Returns:
        what this rank writes, by folder in the checkpoint.
    """
    metadata = _METADATA | {
        "world_size": state.groups.world_size,
        "distributed_optimizer": _has_distributed_optimizer(state),
    }
    with described_only(state.optimizer) as shares:
        described = _sharded(state, is_loading=False) | {"content_metadata": metadata}
    contents = {"": _split_described(state, described, shares)}
    if state.second is not None:
        contents[SECOND] = _other_described(state, state.second.active())
    if state.averaged is not None:
        contents[AVERAGED] = _other_described(state, state.averaged.exchanged())
    return contents


def _split_described(
    state: TrainState, described: dict[str, Any], shares: Shares, *, only: str | None = None
) -> sharded.Content:
    """This rank's parts of ``described``, or of its entry ``only``."""
    groups, experts = state.groups, sharded.expert_keys(described)
    return sharded.split_state(
        described if only is None else {only: described[only]},
        shares,
        experts=experts,
        replicas=groups.replicas.size,
        expert_replicas=groups.expert_replicas.size,
    )


def _other_described(state: TrainState, other: AbstractContextManager[None]) -> sharded.Content:
    """Describe the optimizer state that is active inside ``other``. It is as large as the main state.

    The data is a copy in main memory, because the optimizer holds this state only inside ``other``.
    """
    with other:
        check_finite(state, "no checkpoint was written; --resume auto continues from the previous one")
        with described_only(state.optimizer) as shares:
            described = _sharded(state, is_loading=False)
        boxes, objects, common = _split_described(state, described, shares, only="optimizer")
        state.groups.together(lambda: boxes.update(staged(boxes)))
        return boxes, objects, common


def _open(checkpoint: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint's tensors and objects, and the part that is common to all ranks."""
    common = load_plain(checkpoint / COMMON)
    if not isinstance(common, dict) or not isinstance(common.get("content_metadata", {}), dict):
        raise ValueError(f"{checkpoint / COMMON} was not written by a training run")
    return Checkpoint(checkpoint), common


def _run_state(checkpoint: Path, *, with_arrays: bool) -> dict[str, Any]:
    """The run's state. Only the coordinator needs the arrays in it."""
    run_state = json.loads((checkpoint / RUN_STATE).read_text())
    if not isinstance(run_state, dict) or not isinstance(run_state.get("step"), int):
        raise ValueError(f"{checkpoint / RUN_STATE} was not written by a training run")
    if with_arrays and (checkpoint / ROUTES).is_file():
        return with_arrays_of(run_state, read_arrays(checkpoint / ROUTES))
    return run_state


def _together(groups: ParallelGroups, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and return this rank's result. If one rank fails, all raise CheckpointError."""

    results: list[T] = []

    def plain() -> None:
        try:
            results.append(action())
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error

    groups.together(plain)
    return results[0]


def _has_distributed_optimizer(state: TrainState) -> bool:
    return state.chunks[0].ddp_config.use_distributed_optimizer


def _sharded(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    groups = state.groups
    metadata = dict(_METADATA)  # a copy, because Megatron adds a process group
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(state.chunks)
    }
    # With several chunks Megatron expects a dictionary of the chunks' dictionaries, otherwise the only one.
    flat = model if len(model) > 1 else model["model0"]
    return {
        **model,
        "optimizer": state.optimizer.sharded_state_dict(flat, is_loading=is_loading, metadata=metadata),
        "rng": ShardedObject("rng", _rng_state(), (groups.world_size,), (groups.rank,)),
    }


def _align_steps(optimizer: Any) -> None:
    """Set Adam's step count in every parameter group.

    Megatron-Core saves rank 0's groups for all ranks, and a group that is empty on rank 0 is saved without a step count
    (distrib_optimizer.py; 0.16.1: 655, 0.19.2: 851). If the first pipeline stage has no experts, the experts would
    start again at step 0 but with the moments of later steps, and the update would be much too large.
    """
    groups: list[dict[str, Any]] = [
        group for one in parts_of(optimizer) for group in one.optimizer.param_groups
    ]
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


def _fault(checkpoint: Path, notify: Callable[[str], None], groups: ParallelGroups | Alone) -> str | None:
    """The reason why a checkpoint is damaged, or None. The same on every rank."""
    manifest, fault = groups.once(lambda: _manifest(checkpoint))
    if fault is not None:
        return fault
    digests = _digest_together(checkpoint, list(manifest), groups, notify)
    for name, digest in manifest.items():
        if digests[name] is None:
            return f"{name} is missing"
        if digests[name] != digest:
            return f"{name} has changed since it was written"
    return None


def _manifest(checkpoint: Path) -> tuple[dict[str, str], str | None]:
    """The digests by file name, and the reason why the manifest is damaged (or None)."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return {}, f"no readable {MANIFEST}: {error}"
    if not isinstance(manifest, dict) or not all(isinstance(digest, str) for digest in manifest.values()):
        return {}, f"no readable {MANIFEST}: it is not a list of digests"
    if RUN_STATE not in manifest:
        return {}, f"{MANIFEST} does not name {RUN_STATE}"
    return manifest, None


def _digest_together(
    folder: Path,
    names: list[str],
    groups: ParallelGroups | Alone,
    notify: Callable[[str], None],
) -> dict[str, str | None]:
    """SHA-256 of files below ``folder``; None for a file that does not exist. Ranks and their threads share the
    work."""

    def size(name: str) -> int:
        path = folder / name
        return path.stat().st_size if path.is_file() else 0

    # The largest files first, so that all ranks finish at about the same time.
    shares = groups.once(lambda: sorted(((size(name), name) for name in names), reverse=True))
    mine = shares[groups.rank :: groups.world_size]
    report = _Reading(
        folder, sum(size for size, _ in mine), notify if groups.rank == 0 else lambda text: None
    )

    def read_mine() -> dict[str, str | None]:
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda share: _digest(folder / share[1], report.add), mine)
            return {name: digest for (_, name), digest in zip(mine, found, strict=True)}

    return {name: digest for part in groups.together(read_mine) for name, digest in part.items()}


class _Reading:
    """Reports the progress of long reading. Usable from several threads."""

    def __init__(self, folder: Path, num_bytes: int, notify: Callable[[str], None]) -> None:
        self._folder, self._num_bytes, self._notify = folder, num_bytes, notify
        self._done, self._next = 0, time.monotonic() + _REPORT_S
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _REPORT_S
            done, whole = self._done / 2**30, self._num_bytes / 2**30
            self._notify(f"checking {self._folder}: rank 0 has read {done:.1f} of its {whole:.1f} GiB")


def _digest(path: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> str | None:
    if not path.is_file():
        return None
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


def _drop(checkpoint: Path, notify: Callable[[str], None]) -> None:
    try:
        shutil.rmtree(checkpoint)
    except OSError as error:
        notify(f"{checkpoint} cannot be removed and still uses disk space: {error}")
