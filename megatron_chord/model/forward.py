"""Runs packed micro-batches through Megatron's schedule. The caller gives the loss as a function of log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_chord.data.packing import PackedBatch, PackedRoutes, context_shard, held_targets
from megatron_chord.data.transfer import move_together
from megatron_chord.losses.terms import TermTokens, TokenStats
from megatron_chord.model import specs
from megatron_chord.model.replay import DeviceRoutes, begin_replay, check_replayed, give_routes
from megatron_chord.runtime.parallel import ParallelGroups


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """This context-parallel rank's part of a packed micro-batch, on the device."""

    token_ids: Tensor
    """[1, N]"""
    position_ids: Tensor
    """[1, N]"""
    packed_seq_params: Any
    loss_positions: Tensor
    """[T], indices into the N tokens of this context-parallel rank"""
    targets: Tensor
    """[T]"""
    terms: Mapping[str, TermTokens]
    routes: DeviceRoutes | None = None
    """The experts of the tokens of this rank that the rollout engine routed; None if there are none."""
    teacher: DeviceTeacher | None = None
    """None if no sample of the update has a teacher."""


@dataclass(frozen=True, kw_only=True)
class DeviceTeacher:
    """This context-parallel rank's part of the teachers' sequences of a micro-batch. T is the number of trained tokens
    of the whole micro-batch, on all context-parallel ranks.

    A token of an answer may be on another context-parallel rank than the same token after the teacher's prompt.
    """

    batch: DeviceBatch
    """This rank's part of the teachers' sequences. It has U trained tokens."""
    slots: Tensor
    """[U] int64: indices of the same tokens among the T"""
    own: Tensor
    """int64: indices among the T of the tokens that this rank trains"""
    num_trained: int
    """T"""


MicroLoss = Callable[[TokenStats, Mapping[str, TermTokens]], tuple[Tensor, dict[str, Tensor]]]
"""(stats of the T trained tokens, each term's tokens) -> (this micro-batch's part of the loss, tensors to return)."""


@dataclass(frozen=True, kw_only=True)
class _RankBatch:
    """A batch and this rank's part of it, on the host."""

    whole: PackedBatch
    local: PackedBatch
    """The part of ``whole`` that this context-parallel rank has."""
    routes: PackedRoutes | None
    """The routes for this tensor-parallel rank's routers; None: the routers choose for all tokens."""
    routed_layers: Sequence[int]

    def arrays(self) -> list[np.ndarray]:
        """The arrays that ``_on_device`` takes from the device, in order."""
        local, routes = self.local, self.routes
        found = [local.token_ids, local.position_ids, local.loss_positions, local.targets]
        found.append(self.whole.cu_seqlens)
        for term in local.terms.values():
            found += [term.index, term.sequence, term.lengths, term.held, *term.columns.values()]
        if routes is not None:
            assert isinstance(routes.experts, np.ndarray), (
                "routes must be in memory before a batch is trained"
            )
            found += [routes.positions, routes.experts[:, list(self.routed_layers)].swapaxes(0, 1)]
        return found


def to_device(batch: PackedBatch, groups: ParallelGroups, routed_layers: Sequence[int] = ()) -> DeviceBatch:
    """Copy this context-parallel rank's part of the batch, and of its teachers' sequences, to its device, in one
    asynchronous copy.

    Args:
        routed_layers: numbers of this stage's layers that replay routes; the routes of other layers are not copied.
    """
    context = groups.context

    def of_rank(whole: PackedBatch) -> _RankBatch:
        local = context_shard(whole, context.size, context.rank)
        routes = _routes_of_tensor_rank(local, groups) if routed_layers else None
        return _RankBatch(whole=whole, local=local, routes=routes, routed_layers=routed_layers)

    own = of_rank(batch)
    if batch.teacher is None:
        return _on_device(own, iter(move_together(own.arrays(), groups.device)), groups)
    teachers = of_rank(batch.teacher.batch)
    slots = batch.teacher.slots[held_targets(teachers.whole, context.size, context.rank)]
    places = held_targets(batch, context.size, context.rank)
    moved = iter(move_together([*own.arrays(), *teachers.arrays(), slots, places], groups.device))
    return replace(
        _on_device(own, moved, groups),
        teacher=DeviceTeacher(
            batch=_on_device(teachers, moved, groups),
            slots=next(moved),
            own=next(moved),
            num_trained=len(batch.targets),
        ),
    )


def _on_device(batch: _RankBatch, moved: Iterator[Tensor], groups: ParallelGroups) -> DeviceBatch:
    from megatron_chord.model.packed import PackedSequences, SharedPrompts

    token_ids, position_ids, loss_positions, targets, starts = (next(moved) for _ in range(5))
    if not specs.has_transformer_engine():
        # Kept on the host: the local layers split packs into sequences with it (model/local_modules.py, and Megatron's
        # unfused RoPE, rope_utils.py:204). On the device, the host would wait for it in every layer.
        starts = torch.from_numpy(batch.whole.cu_seqlens)
    longest = int(batch.whole.position_ids.max()) + 1
    packed = {
        "qkv_format": "thd",
        "cu_seqlens_q": starts,
        "cu_seqlens_kv": starts,
        "cu_seqlens_q_padded": starts,
        "cu_seqlens_kv_padded": starts,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
    shares = bool((batch.whole.prompts >= 0).any())
    return DeviceBatch(
        token_ids=token_ids[None],
        position_ids=position_ids[None],
        packed_seq_params=SharedPrompts(**packed, prompts=tuple(batch.whole.prompts.tolist()))
        if shares
        else PackedSequences(**packed),
        loss_positions=loss_positions,
        targets=targets,
        terms={
            name: TermTokens(
                index=next(moved),
                sequence=next(moved),
                lengths=next(moved),
                held=next(moved),
                columns={key: next(moved) for key in term.columns},
                context=groups.context.group if groups.context.size > 1 else None,
            )
            for name, term in batch.local.terms.items()
        },
        routes=None
        if batch.routes is None
        else DeviceRoutes(
            positions=next(moved),
            experts=dict(zip(batch.routed_layers, next(moved).unbind(), strict=True)),
        ),
    )


def _routes_of_tensor_rank(batch: PackedBatch, groups: ParallelGroups) -> PackedRoutes | None:
    """The routes of the tokens that this tensor-parallel rank's routers see, by their place among these.

    Experts need sequence parallelism on a tensor axis (``build.check_shape``): each rank has one of ``tensor`` equal
    parts of the tokens.
    """
    size, rank = groups.tensor.size, groups.tensor.rank
    if batch.routes is None or size == 1:
        return batch.routes
    length = len(batch.token_ids) // size
    places = np.arange(len(batch.token_ids)) - rank * length
    return batch.routes.moved(np.where(places < length, places, -1))


def run_micro_batches(
    chunks: Sequence[Any],
    micro_batches: Sequence[DeviceBatch],
    loss: MicroLoss,
    *,
    groups: ParallelGroups,
    vocab_size: int,
    temperatures: Mapping[str, float],
    rival: bool = False,
    backward: bool = True,
) -> list[dict[str, Tensor]]:
    """Run forward passes, and backward passes with ``backward``, over this data-parallel rank's micro-batches.

    The gradient in the parameters is that of the **sum** of ``loss`` over all micro-batches of all data-parallel and
    context-parallel ranks: Megatron's averaging is undone here.

    Args:
        chunks: model chunks; wrapped in DistributedDataParallel if there is a backward pass.
        micro_batches: every rank has the same number.
        temperatures: by term, the temperature of its tokens.
        rival: compute ``TokenStats.rival``.

    Returns:
        the tensors that ``loss`` returned for each micro-batch; empty except on the last pipeline stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # A two-tuple loss is multiplied by context / micro-batches and its gradient averaged over data x context
    # (megatron/core/pipeline_parallel/schedules.py, forward_step_calc_loss).
    undo = len(micro_batches) * groups.data.size

    def forward_step(batches: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        groups.pulse.tick()
        batch: DeviceBatch = next(batches)
        give_routes(unwrapped(model), batch.routes)
        output = model(batch.token_ids, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)

        def loss_of(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            head = unwrapped(model).token_logprobs(
                hidden,
                batch.loss_positions,
                batch.targets,
                vocab_size=vocab_size,
                temperature=temperature_of(batch, temperatures),
                tensor=groups.tensor,
                rival=rival,
            )
            value, kept = loss(TokenStats(*head), batch.terms)
            return value * undo, kept

        return output, loss_of

    policies = [unwrapped(chunk) for chunk in chunks]
    begin_replay(policies, has_backward=backward)
    iterators = [iter(micro_batches) for _ in chunks]
    with torch.set_grad_enabled(backward):
        kept = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].token_ids.shape[1],
            micro_batch_size=1,
            forward_only=not backward,
        )
    check_replayed(policies)
    groups.pulse.tick()
    return kept


def temperature_of(batch: DeviceBatch, temperatures: Mapping[str, float]) -> float | Tensor:
    """One number if all terms of the batch have the same temperature, else [T] float32. The host does not wait."""
    found = {temperatures[name] for name in batch.terms}
    if len(found) <= 1:
        return found.pop() if found else 1.0
    values = torch.ones_like(batch.targets, dtype=torch.float32)
    for name, tokens in batch.terms.items():
        values.index_fill_(0, tokens.index, temperatures[name])
    return values


def unwrapped(chunk: Any) -> Any:
    """The PolicyModel inside Megatron's DistributedDataParallel, or the model itself."""
    from megatron.core.distributed import DistributedDataParallel

    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
