"""Starts torch.distributed and Megatron's process groups, and returns them as one value, ``ParallelGroups``.

No other module of the project reads a rank's position from Megatron's global state.
"""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_chord.config import ParallelConfig, data_parallel_size
from megatron_chord.runtime import adam, cpu, megatron
from megatron_chord.runtime.heartbeat import Pulse
from megatron_chord.runtime.rendezvous import meet, world_size_of_environment

T = TypeVar("T")

EXPERT_TENSOR = 1
"""Tensor-parallel size of experts. Experts are spread over ranks but never cut, because Megatron's all-to-all
dispatcher cannot cut them over gloo."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One parallel axis, with this rank's position on it."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    device: torch.device
    world_size: int
    rank: int
    tensor: Axis
    pipeline: Axis
    data: Axis
    """Data-parallel replicas, without the context axis."""
    context: Axis
    replicas: Axis
    """Data-parallel and context-parallel ranks together. They hold the same weights."""
    replicas_host: dist.ProcessGroup
    """The ranks of ``replicas`` as a gloo group."""
    expert: Axis
    """Ranks that hold different experts. The ranks of tensor, context and data axis together form the expert axes."""
    expert_replicas: Axis
    """Ranks that hold the same experts."""
    objects: dist.ProcessGroup
    """All ranks as a gloo group, for Python objects and the coordinator's plans."""
    replica: dist.ProcessGroup
    """The ranks with this data-parallel rank as a gloo group. Together they hold one copy of the model (two or more
    with context parallelism), and train the same batches."""
    first_of_replica: tuple[int, ...]
    """The first global rank of each data-parallel rank, in their order. That of data-parallel rank 0 is the
    coordinator."""
    pulse: Pulse = field(default_factory=Pulse)
    """Phase and progress of this rank's main thread, for the watchdog (``runtime.heartbeat``)."""

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def holds_first_replica(self) -> bool:
        """True if this rank is data-parallel and context-parallel rank 0."""
        return self.data.rank == 0 and self.context.rank == 0

    @property
    def holds_first_experts(self) -> bool:
        """True if this rank is the first of the ranks that hold the same experts."""
        return self.expert_replicas.rank == 0

    @property
    def is_exporter(self) -> bool:
        """True if this rank sends weights to servers and exports them. Each pipeline stage has one such rank."""
        return self.holds_first_replica and self.tensor.rank == 0

    def from_coordinator(self, compute: Callable[[], tuple[Any, Sequence[Any] | None]]) -> tuple[Any, Any]:
        """Run ``compute`` on the coordinator and distribute its result. An exception there is raised on every rank.

        Args:
            compute: returns a common part for all ranks, and a list with one entry for each data-parallel rank (or
                None).

        Returns:
            the common part, and this data-parallel rank's entry. 1 or 2 collectives on ``objects``, and with entries
            the sends and the broadcast of ``_scatter``.
        """
        outcome: Any = None
        messages: list[torch.Tensor] = []
        if self.is_coordinator:
            try:
                common, per_rank = compute()
                messages = [message(value) for value in per_rank or ()]
                outcome = (None, common, per_rank is not None)
            except Exception as error:
                if self.world_size == 1:
                    raise
                outcome = (_sendable(error), None, False)
        error, common, has_parts = self._broadcast(outcome)
        if error is not None:
            raise error
        return common, self._scatter(messages) if has_parts else None

    def once(self, compute: Callable[[], T]) -> T:
        """Run ``compute`` on the coordinator only. Every rank returns its result or raises its exception."""
        result, _ = self.from_coordinator(lambda: (compute(), None))
        return result

    def once_per_replica(self, compute: Callable[[], T]) -> T:
        """Run ``compute`` on the first rank of each model replica (``replica``). Every rank returns the result of its
        replica's first rank, or raises the exception of one of them. Two collectives: on ``objects``, on ``replica``.
        """
        first = self.first_of_replica[self.data.rank]
        error: Exception | None = None
        box: list[Any] = [None]
        if self.rank == first:
            try:
                box = [compute()]
            except Exception as failed:
                error = _sendable(failed)
        for other in self.gather(error):
            if other is not None:
                raise other
        if dist.get_world_size(self.replica) > 1:
            dist.broadcast_object_list(box, src=first, group=self.replica)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's Python object, on every rank, in rank order. One collective of ``objects``."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def to_coordinator(self, value: Any) -> list[Any]:
        """Every rank's Python object in rank order, on the coordinator; an empty list on the others. One collective."""
        values: list[Any] | None = [None] * self.world_size if self.is_coordinator else None
        dist.gather_object(value, values, dst=0, group=self.objects)
        return values or []

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run ``action`` on every rank and gather the results. If it fails on any rank, every rank raises."""
        try:
            outcome = (None, action())
        except Exception as error:
            outcome = (_sendable(error), None)
        outcomes = self.gather(outcome)
        for error, _ in outcomes:
            if error is not None:
                raise error
        return [result for _, result in outcomes]

    def _broadcast(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def _scatter(self, messages: Sequence[torch.Tensor]) -> Any:
        """This data-parallel rank's entry of what the coordinator has, which is in its ``messages``.

        The coordinator sends each entry once, to the first rank of its model replica, which broadcasts it within the
        replica. One broadcast on ``objects``, one send for each replica, one broadcast on ``replica``.
        """
        if self.world_size == 1:
            return pickle.loads(messages[0].numpy().data)
        sizes = torch.tensor([len(text) for text in messages] or [0] * self.data.size)
        dist.broadcast(sizes, src=0, group=self.objects)
        first = self.first_of_replica[self.data.rank]
        sends = [
            dist.isend(text, dst, group=self.objects)
            for text, dst in zip(messages, self.first_of_replica, strict=False)
            if dst != 0
        ]
        own = messages[0] if messages else torch.empty(int(sizes[self.data.rank]), dtype=torch.uint8)
        if self.rank == first and first != 0:
            dist.recv(own, src=0, group=self.objects)
        if dist.get_world_size(self.replica) > 1:
            dist.broadcast(own, src=first, group=self.replica)
        for send in sends:
            assert send is not None
            send.wait()
        return pickle.loads(own.numpy().data)


def message(value: Any) -> torch.Tensor:
    """The pickled value. [bytes] uint8"""
    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _sendable(error: Exception) -> Exception:
    """The exception itself if it can be pickled, otherwise a RuntimeError with the same message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def start(
    parallel: ParallelConfig,
    *,
    seed: int,
    collective_timeout_s: float = 600.0,
    coordinator_timeout_s: float | None = None,
) -> ParallelGroups:
    """Join torch.distributed (NCCL with CUDA, else gloo) and build Megatron's groups.

    ``coordinator_timeout_s`` is how long ranks wait for the coordinator's plans (sampling a step may take longer
    than any collective); by default ``collective_timeout_s``. Rank, world size and rendezvous come from torchrun's
    environment; alone, a process is a world of one, which uses no store on the network.
    Without CUDA, Megatron-Core is adapted first (``runtime.cpu``).

    Raises:
        ValueError: the axes do not divide the number of processes, a node has fewer devices than ranks, or MASTER_ADDR
            is not an address of rank 0's machine that the other ranks can reach.
    """
    data_parallel_size(parallel, world_size_of_environment())
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        index = device_index(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        cpu.install()
    megatron.complete_names()
    megatron.leave_out_notices()
    adam.install_if_needed()
    if not dist.is_initialized():
        meet(backend, timeout_s=collective_timeout_s)
    return build_groups(
        parallel,
        device=device,
        seed=seed,
        collective_timeout_s=collective_timeout_s,
        coordinator_timeout_s=coordinator_timeout_s or collective_timeout_s,
    )


def device_index(local_rank: int, count: int) -> int:
    """Index of this rank's CUDA device among ``count`` visible ones.

    It is the local rank, or 0 if the rank sees only one device (as with Slurm's --gpus-per-task). Raises ValueError if
    there is no device for this rank.
    """
    if count > 1 and local_rank >= count:
        raise ValueError(f"this is local rank {local_rank}, but CUDA finds {count} devices on its node")
    return local_rank if count > 1 else 0


def axis_sizes(parallel: ParallelConfig) -> dict[str, Any]:
    """The sizes of the axes, with the argument names of Megatron's ``initialize_model_parallel`` and
    ``TransformerConfig``."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": EXPERT_TENSOR,
    }


def build_groups(
    parallel: ParallelConfig,
    *,
    device: torch.device,
    seed: int,
    collective_timeout_s: float = 600.0,
    coordinator_timeout_s: float = 600.0,
) -> ParallelGroups:
    """Build Megatron's groups after torch.distributed is initialised. Groups of an earlier call are destroyed, so that
    nothing that was built with them can communicate any more."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.is_initialized():
        _destroy_groups()
    parallel_state.initialize_model_parallel(
        **axis_sizes(parallel), distributed_timeout_minutes=max(1, round(collective_timeout_s / 60))
    )
    # There is no dropout, so all ranks may use the same seed. Megatron needs its random-state tracker nevertheless.
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def axis(group: Any) -> Axis:
        return Axis(size=dist.get_world_size(group), rank=dist.get_rank(group), group=group)

    data = axis(parallel_state.get_data_parallel_group())
    host: Any = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    objects: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=coordinator_timeout_s))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, data.rank, group=objects)
    members = [[rank for rank, at in enumerate(ranks) if at == place] for place in range(data.size)]
    replica: Any
    replica, _ = dist.new_subgroups_by_enumeration(
        members, timeout=datetime.timedelta(seconds=coordinator_timeout_s), backend="gloo"
    )
    assert members[0][0] == 0
    return ParallelGroups(
        device=device,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=axis(parallel_state.get_pipeline_model_parallel_group()),
        data=data,
        context=axis(parallel_state.get_context_parallel_group()),
        replicas=axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        replicas_host=host,
        expert=axis(parallel_state.get_expert_model_parallel_group()),
        expert_replicas=axis(parallel_state.get_expert_data_parallel_group()),
        objects=objects,
        replica=replica,
        first_of_replica=tuple(ranks[0] for ranks in members),
    )


def stop() -> None:
    """Destroy Megatron's groups and leave torch.distributed. Does nothing if they were never started."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _destroy_groups() -> None:
    """Destroy all groups but the one of all ranks. Megatron only forgets its groups, and the threads of a forgotten
    gloo group never end."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
