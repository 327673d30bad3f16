"""TrainSamples -> packed micro-batches for every data-parallel rank, and the step's global token counts.

Samples of all terms are packed one after another, so that there is no padding except for alignment, and one pass
serves all terms. Every rank gets the same number of micro-batches, because ranks would otherwise wait for each other
forever. A rank without samples gets a batch without trained tokens, which contributes exactly 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_chord.data.shared_prompts import groups_by_prompt, prompt_of, prompt_tokens
from megatron_chord.precision import Fp8Training, batch_multiple
from megatron_chord.records import Part, TrainSample
from megatron_chord.routes import RemoteRoutes, Routes, joined

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PackedTerm:
    """The K trained tokens of one term of the objective, out of the T trained tokens of a micro-batch."""

    index: np.ndarray
    """[K] int64: their indices among the T trained tokens"""
    sequence: np.ndarray
    """[K] int64: the index of the token's sequence among the term's S sequences (each part of a sample is a
    sequence)"""
    lengths: np.ndarray
    """[S] float32: number of tokens of each sequence, on all context-parallel ranks together"""
    held: np.ndarray
    """[S] int64: number of tokens of each sequence on this rank. They are contiguous, in the order of the sequences"""
    columns: Mapping[str, np.ndarray]
    """The constants by name, [K] float32 each"""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what ``_received_term`` can compute."""
        is_all = np.array_equal(self.index, np.arange(len(self.index)))
        assert np.array_equal(self.sequence, np.repeat(np.arange(len(self.held)), self.held))
        index = None if is_all else self.index.astype(np.int32)
        return _received_term, (index, self.lengths, self.held, dict(self.columns))


@dataclass(frozen=True, kw_only=True)
class PackedRoutes:
    """The experts of the F tokens of a micro-batch that the rollout engine routed. All others are routed by the
    model."""

    positions: np.ndarray
    """[F] int64: their indices among the N tokens"""
    experts: Routes
    """[F, layers, k] uint8 or uint16: the experts of each in every layer of the model. In training they are in memory;
    before that they may still be on rollout servers."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the runs of consecutive positions: one or two for each sample."""
        places = self.positions
        first = np.flatnonzero(np.diff(places, prepend=places[:1] - 2) != 1)
        lengths = np.diff(first, append=len(places))
        return _received_routes, (places[first], lengths, self.experts)

    def here(self, read: dict[str, np.ndarray]) -> PackedRoutes:
        """Return a copy in which the routes from ``read`` replace those on servers (``routes.RemoteRoutes.here``)."""
        experts = self.experts
        return replace(self, experts=experts.here(read)) if isinstance(experts, RemoteRoutes) else self

    def moved(self, places: np.ndarray) -> PackedRoutes:
        """Return a copy with the tokens at their new indices ``places`` [N]. Tokens with a negative index are left
        out."""
        found = places[self.positions]
        assert isinstance(self.experts, np.ndarray), "routes must be in memory before a batch is split"
        return PackedRoutes(positions=found[found >= 0], experts=self.experts[found >= 0])


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch of one data-parallel rank: N tokens in sequences, T of them trained."""

    token_ids: np.ndarray
    """[N] int64"""
    position_ids: np.ndarray
    """[N] int64, from 0 in every sequence; with a shared prompt, from the prompt's number of tokens"""
    cu_seqlens: np.ndarray
    """[sequences + 1] int32: the start of each sequence, and N"""
    prompts: np.ndarray
    """[sequences] int32: the index of the sequence that comes before this one as its prompt (``shared_prompts``); -1:
    none"""
    loss_positions: np.ndarray
    """[T] int64: the index, among the N tokens, of the hidden state that predicts the trained token"""
    targets: np.ndarray
    """[T] int64: the trained token"""
    terms: Mapping[str, PackedTerm]
    """All terms of the step. Every micro-batch has every term that trains a token anywhere in the step."""
    routes: PackedRoutes | None = None
    """None if the model routes all tokens."""
    teacher: PackedTeacher | None = None
    """The same answers after their teachers' prompts; None if no sample of the update has a teacher."""

    @property
    def saved(self) -> tuple[int, int]:
        """The saving by shared prompts: number of tokens, and sum of the squared lengths of the prompt copies left
        out."""
        used = np.bincount(self.prompts[self.prompts >= 0], minlength=len(self.prompts))
        lengths = np.diff(self.cu_seqlens).astype(np.int64)
        again = np.maximum(used - 1, 0)
        return int((again * lengths).sum()), int((again * lengths**2).sum())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what ``_received_batch`` can compute, because rank 0 sends the batches of all ranks. For
        whole batches only, not for those of one context-parallel rank."""
        assert np.array_equal(self.targets, self.token_ids.take(self.loss_positions + 1, mode="clip"))
        return _received_batch, (
            self.token_ids.astype(np.int32),
            self.cu_seqlens,
            self.prompts if (self.prompts >= 0).any() else None,
            self.loss_positions.astype(np.int32),
            dict(self.terms),
            self.routes,
            self.teacher,
        )


@dataclass(frozen=True, kw_only=True)
class PackedTeacher:
    """The answers of those samples of a micro-batch that have a teacher, each after its teacher's prompt."""

    batch: PackedBatch
    """It has the terms of the micro-batch, without constants, and U trained tokens."""
    slots: np.ndarray
    """[U] int64: for each trained token, the index of the same token among the T trained tokens of the micro-batch"""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All micro-batches of one optimizer update, by data-parallel rank."""

    micro_batches: tuple[tuple[PackedBatch, ...], ...]
    counts: Mapping[str, int]
    """Trained tokens of each term, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Requirements of the parallel layout for a packed batch."""

    data: int = 1
    """Number of data-parallel ranks."""
    sequence_multiple: int = 1
    """Every sequence's length is a multiple of this: 2 x context with context parallelism."""
    batch_multiple: int = 1
    """Every batch's length is a multiple of this: tensor x context with sequence parallelism, more with FP8."""
    count_multiple: int = 1
    """Micro-batches per rank are a multiple of this: the interleaved pipeline schedule needs a multiple of its
    stages."""
    attention_cost: float = 0.0
    """A sequence of n tokens costs n + attention_cost n^2, in units of a token's matrix products."""
    shares_prompts: bool = False
    """Samples with the same prompt are packed with one copy of it. Needs ``sequence_multiple`` 1."""


def make_layout(
    *,
    data: int,
    tensor: int,
    pipeline: int,
    context: int,
    sequence_parallel: bool,
    virtual: bool,
    attention_cost: float = 0.0,
    fp8: Fp8Training | None = None,
) -> Layout:
    sequence = 2 * context if context > 1 else 1
    batch = math.lcm(sequence, tensor * context if sequence_parallel else 1)
    if fp8 is not None:
        batch = batch_multiple(fp8, tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    return Layout(
        data=data,
        sequence_multiple=sequence,
        batch_multiple=batch,
        count_multiple=pipeline if virtual else 1,
        attention_cost=attention_cost,
    )


def plan_step(samples: Sequence[TrainSample], *, max_tokens: int, layout: Layout, pad_id: int) -> StepPlan:
    """Pack one optimizer update's samples. The work is nearly equal for all ranks and for all micro-batches.

    Args:
        max_tokens: budget of one micro-batch, alignment padding included, and of its teachers' sequences. A longer
            sample gets its own micro-batch.
        pad_id: token of alignment padding. It is never trained, and no trained token attends to it.
    """
    capacity = max(max_tokens // layout.batch_multiple, 1) * layout.batch_multiple
    teachers = [teacher_of(sample) for sample in samples]
    groups = _groups(samples, teachers, capacity, layout)
    lengths, work = list[int](), list[float]()
    for group in groups:
        own_length, own_work = _size([samples[index] for index in group], layout)
        length, teachers_work = _size(_present([teachers[index] for index in group]), layout)
        lengths.append(max(own_length, length))
        work.append(own_work + teachers_work / 3)  # a teacher's sequence has a forward pass only
    bins = balanced_bins(
        lengths, work, capacity=capacity, multiple=layout.data, rank_multiple=layout.count_multiple
    )
    columns = columns_of(samples)
    has_teachers = any(teacher is not None for teacher in teachers)

    def packed(members: Sequence[TrainSample]) -> PackedBatch:
        batch = pack(members, columns=columns, layout=layout, pad_id=pad_id)
        if not has_teachers:
            return batch
        return replace(batch, teacher=pack_teachers(members, terms=columns, layout=layout, pad_id=pad_id))

    batches = [packed([samples[i] for group in members for i in groups[group]]) for members in bins]
    return StepPlan(
        micro_batches=tuple(map(tuple, dealt(batches, layout.data))),
        counts=token_counts(samples),
    )


def _groups(
    samples: Sequence[TrainSample], teachers: Sequence[TrainSample | None], capacity: int, layout: Layout
) -> list[list[int]]:
    """The samples that go into a micro-batch together, by their indices: each alone, unless prompts are shared.

    A group is at most a data-parallel rank's share of the tokens, so that all ranks have work. Its teachers' sequences
    fit the capacity, too, unless one alone does not.
    """
    if not layout.shares_prompts:
        return [[index] for index in range(len(samples))]
    share = -(-sum(len(sample.token_ids) for sample in samples) // layout.data)
    found: list[list[int]] = []
    for group in groups_by_prompt(samples, max_tokens=min(capacity, share)):
        found.append([])
        for index in group:
            longer = _present([teachers[i] for i in (*found[-1], index)])
            if found[-1] and _size(longer, layout)[0] > capacity:
                found.append([])
            found[-1].append(index)
    return found


def _size(samples: Sequence[TrainSample], layout: Layout) -> tuple[int, float]:
    """The number of tokens and the work of neighbours in a micro-batch."""
    tokens, work = 0, 0.0
    for shared, members in _with_shared_prompts(samples, layout):
        own = [_round_up(len(sample.token_ids), layout.sequence_multiple) for sample in members]
        saved = (len(members) - 1) * shared
        tokens += sum(own) - saved
        work += sum(n + layout.attention_cost * n**2 for n in own) - saved
    return tokens, work


def _present(samples: Sequence[TrainSample | None]) -> list[TrainSample]:
    return [sample for sample in samples if sample is not None]


def columns_of(samples: Sequence[TrainSample]) -> dict[str, tuple[str, ...]]:
    """The constants' names of each term that trains a token of these samples."""
    found: dict[str, tuple[str, ...]] = {}
    for part in (part for sample in samples for part in sample.parts if len(part.positions)):
        names = found.setdefault(part.term, tuple(part.constants))
        assert set(names) == set(part.constants), f"parts of {part.term} with different constants"
    return dict(sorted(found.items()))


def token_counts(samples: Sequence[TrainSample]) -> dict[str, int]:
    """Trained tokens of each term."""
    counts = dict.fromkeys(columns_of(samples), 0)
    for part in (part for sample in samples for part in sample.parts if len(part.positions)):
        counts[part.term] += len(part.positions)
    return counts


def balanced_bins(
    lengths: Sequence[int],
    work: Sequence[float],
    *,
    capacity: int,
    multiple: int = 1,
    rank_multiple: int = 1,
) -> list[list[int]]:
    """Distribute items over as few bins of ``capacity`` as possible, with nearly equal work.

    The number of bins is a multiple of ``multiple * rank_multiple``; the bins are in order of decreasing work. An item
    above the capacity gets its own bin.
    """
    step = multiple * rank_multiple
    oversized = [[i] for i, length in enumerate(lengths) if length > capacity]
    rest = [i for i, length in enumerate(lengths) if length <= capacity]
    count = math.ceil(sum(lengths[i] for i in rest) / capacity)
    while True:
        total = max(_round_up(count + len(oversized), step), step)
        rooms = np.full(total - len(oversized), capacity)
        bins = _spread(rest, lengths, work, rooms) or _squeezed(rest, lengths, rooms)
        if bins is not None:
            return sorted(oversized + bins, key=lambda members: -sum(work[i] for i in members))
        count = total - len(oversized) + 1


def _spread(
    items: Sequence[int], lengths: Sequence[int], work: Sequence[float], rooms: np.ndarray
) -> list[list[int]] | None:
    """Place items in order of decreasing work, each into the bin with the least work that has room. None if no bin has
    room for an item."""
    rooms, done = rooms.copy(), np.zeros(len(rooms))
    bins: list[list[int]] = [[] for _ in rooms]
    for i in sorted(items, key=lambda i: -work[i]):
        least = int(np.argmin(np.where(rooms >= lengths[i], done, np.inf)))
        if rooms[least] < lengths[i]:
            return None
        bins[least].append(i)
        rooms[least] -= lengths[i]
        done[least] += work[i]
    return [sorted(members) for members in bins]


def _squeezed(items: Sequence[int], lengths: Sequence[int], rooms: np.ndarray) -> list[list[int]] | None:
    """Best fit decreasing: the longest item first, each into the bin where it leaves the least room."""
    rooms = rooms.copy()
    bins: list[list[int]] = [[] for _ in rooms]
    for i in sorted(items, key=lambda i: -lengths[i]):
        tightest = int(np.argmin(np.where(rooms >= lengths[i], rooms, np.iinfo(rooms.dtype).max)))
        if rooms[tightest] < lengths[i]:
            return None
        bins[tightest].append(i)
        rooms[tightest] -= lengths[i]
    return [sorted(members) for members in bins]


def dealt(items: Sequence[T], ranks: int) -> list[list[T]]:
    """Deal items, sorted by size, to ranks in alternating order, so that no rank always gets the largest of a
    round."""
    hands: list[list[T]] = [[] for _ in range(ranks)]
    for first in range(0, len(items), ranks):
        order = range(ranks) if first // ranks % 2 == 0 else reversed(range(ranks))
        for rank, item in zip(order, items[first : first + ranks], strict=True):
            hands[rank].append(item)
    return hands


def pack(
    samples: Sequence[TrainSample],
    *,
    columns: Mapping[str, Sequence[str]],
    layout: Layout,
    pad_id: int,
) -> PackedBatch:
    """Pack samples one after another. Without samples the batch consists of padding only.

    If ``layout.shares_prompts``, neighbours with the same prompt get one copy of it, as a sequence before theirs.

    Args:
        columns: the step's terms with the names of their constants. The batch has all of them, empty ones too.
    """
    tokens: list[np.ndarray] = []
    positions, starts, prompts = list[np.ndarray](), [0], list[int]()
    trained: list[tuple[int, Part]] = []
    routed: list[tuple[int, Routes]] = []
    """The start of tokens that the rollout engine routed, and their routes."""

    def add(ids: np.ndarray, length: int, first: int, prompt: int) -> None:
        tokens.extend([ids.astype(np.int64), np.full(length - len(ids), pad_id, np.int64)])
        positions.append(np.arange(first, first + length, dtype=np.int64))
        starts.append(starts[-1] + length)
        prompts.append(prompt)

    for shared, members in _with_shared_prompts(samples, layout):
        if shared:
            routed += [(starts[-1], routes[:shared]) for routes in _first_routes(members)]
            add(members[0].token_ids[:shared], shared, 0, -1)
        prompt = len(prompts) - 1 if shared else -1
        for sample in members:
            own = sample.token_ids[shared:]
            trained += [(starts[-1] - shared, part) for part in sample.parts if len(part.positions)]
            routed += [(starts[-1], routes[shared:]) for routes in _first_routes([sample])]
            add(own, _round_up(len(own), layout.sequence_multiple), shared, prompt)
    tail = _round_up(max(starts[-1], layout.sequence_multiple), layout.batch_multiple) - starts[-1]
    if tail:
        add(np.zeros(0, np.int64), tail, 0, -1)
    token_ids = np.concatenate(tokens)
    # Ascending in the batch, independent of the order of the parts.
    where = {
        term: _joined([start + part.positions for start, part in trained if part.term == term])
        for term in columns
    }
    targets_at = np.sort(_joined(list(where.values())))
    return PackedBatch(
        token_ids=token_ids,
        position_ids=np.concatenate(positions),
        cu_seqlens=np.array(starts, np.int32),
        prompts=np.array(prompts, np.int32),
        loss_positions=targets_at - 1,
        targets=token_ids[targets_at],
        terms={
            term: _packed_term(
                [part for _, part in trained if part.term == term],
                np.searchsorted(targets_at, where[term]),
                names,
            )
            for term, names in columns.items()
        },
        routes=PackedRoutes(
            positions=_joined([start + np.arange(len(routes)) for start, routes in routed]),
            experts=joined([routes for _, routes in routed]),
        )
        if routed
        else None,
    )


def _first_routes(samples: Sequence[TrainSample]) -> list[Routes]:
    """The routes of the first sample that has any; empty if none has. The engine routes a prompt once for all of its
    answers, or with differences only by rounding."""
    return [sample.routes for sample in samples if sample.routes is not None][:1]


def _with_shared_prompts(
    samples: Sequence[TrainSample], layout: Layout
) -> Iterator[tuple[int, Sequence[TrainSample]]]:
    """Yield (number of shared tokens, the neighbours that share them) in the order of the samples."""
    if not layout.shares_prompts:
        yield from ((0, [sample]) for sample in samples)
        return
    for prompt, members in itertools.groupby(samples, key=prompt_of):
        found = list(members)
        if len(found) > 1 and prompt:
            yield prompt_tokens(found[0]), found
        else:
            yield from ((0, [sample]) for sample in found)


def teacher_of(sample: TrainSample) -> TrainSample | None:
    """The sample after its teacher's prompt, without constants; None if it has no teacher."""
    if sample.teacher_ids is None:
        return None
    shift = len(sample.teacher_ids) - len(sample.token_ids)
    parts = tuple(Part(term=part.term, positions=part.positions + shift) for part in sample.parts)
    first = min((int(part.positions[0]) for part in sample.parts if len(part.positions)), default=None)
    assert first is None or np.array_equal(sample.teacher_ids[first + shift :], sample.token_ids[first:])
    return TrainSample(token_ids=sample.teacher_ids, parts=parts)


def pack_teachers(
    samples: Sequence[TrainSample], *, terms: Iterable[str], layout: Layout, pad_id: int
) -> PackedTeacher:
    """Pack the samples of a micro-batch that have a teacher, in the order of the micro-batch."""
    teachers = [teacher_of(sample) for sample in samples]
    # Both batches have their trained tokens in the same order.
    has_teacher = [
        np.full(sum(len(part.positions) for part in sample.parts), teacher is not None)
        for sample, teacher in zip(samples, teachers, strict=True)
    ]
    return PackedTeacher(
        batch=pack(_present(teachers), columns=dict.fromkeys(terms, ()), layout=layout, pad_id=pad_id),
        slots=np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *has_teacher])),
    )


def context_order(length: int, context: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Positions of a sequence of ``length`` on context-parallel rank ``rank``: chunks r and 2c - 1 - r of 2c chunks.

    Causal attention then costs the same on every rank (Transformer Engine's layout).
    """
    chunk = length // (2 * context)
    first, last = rank * chunk, (2 * context - 1 - rank) * chunk
    return torch.cat(
        [torch.arange(start, start + chunk, device=device) for start in (first, last)],
    )


def context_shard(batch: PackedBatch, context: int, rank: int) -> PackedBatch:
    """The tokens of one context-parallel rank. ``cu_seqlens`` remains that of the whole batch."""
    if context == 1:
        return batch
    assert (batch.prompts < 0).all(), "prompts are not shared with context parallelism"
    held, local = _held_tokens(batch, context, rank)
    mine = local[batch.loss_positions] >= 0
    new_index = np.cumsum(mine) - 1
    return replace(
        batch,
        token_ids=batch.token_ids[held],
        position_ids=batch.position_ids[held],
        loss_positions=local[batch.loss_positions][mine],
        targets=batch.targets[mine],
        terms={
            name: replace(
                term,
                index=new_index[term.index][mine[term.index]],
                sequence=term.sequence[mine[term.index]],
                held=np.bincount(term.sequence[mine[term.index]], minlength=len(term.lengths)),
                columns={key: column[mine[term.index]] for key, column in term.columns.items()},
            )
            for name, term in batch.terms.items()
        },
        routes=None if batch.routes is None else batch.routes.moved(local),
    )


def held_targets(batch: PackedBatch, context: int, rank: int) -> np.ndarray:
    """Indices of the trained tokens that one context-parallel rank holds, among the T of the whole batch: int64."""
    if context == 1:
        return np.arange(len(batch.targets))
    _, local = _held_tokens(batch, context, rank)
    return np.flatnonzero(local[batch.loss_positions] >= 0)


def _held_tokens(batch: PackedBatch, context: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of one context-parallel rank's tokens among the N of the batch, and for each of the N its index among
    the rank's tokens, -1 for others."""
    starts = batch.cu_seqlens.tolist()
    held = np.concatenate(
        [
            start + context_order(stop - start, context, rank).numpy()
            for start, stop in itertools.pairwise(starts)
        ]
    )
    local = np.full(len(batch.token_ids), -1, np.int64)
    local[held] = np.arange(len(held))
    return held, local


def _received_batch(
    token_ids: np.ndarray,
    cu_seqlens: np.ndarray,
    prompts: np.ndarray | None,
    loss_positions: np.ndarray,
    terms: dict[str, PackedTerm],
    routes: PackedRoutes | None,
    teacher: PackedTeacher | None,
) -> PackedBatch:
    lengths = np.diff(cu_seqlens)
    if prompts is None:
        prompts = np.full(len(lengths), -1, np.int32)
    first = np.where(prompts >= 0, lengths[prompts], 0)
    return PackedBatch(
        token_ids=token_ids.astype(np.int64),
        position_ids=np.arange(len(token_ids)) - np.repeat(cu_seqlens[:-1] - first, lengths),
        cu_seqlens=cu_seqlens,
        prompts=prompts,
        loss_positions=loss_positions.astype(np.int64),
        targets=token_ids[loss_positions + 1].astype(np.int64),
        terms=terms,
        routes=routes,
        teacher=teacher,
    )


def _received_routes(starts: np.ndarray, lengths: np.ndarray, experts: Routes) -> PackedRoutes:
    before = np.cumsum(lengths) - lengths
    return PackedRoutes(
        positions=np.repeat(starts - before, lengths) + np.arange(int(lengths.sum())), experts=experts
    )


def _received_term(
    index: np.ndarray | None, lengths: np.ndarray, held: np.ndarray, columns: dict[str, np.ndarray]
) -> PackedTerm:
    return PackedTerm(
        index=np.arange(held.sum()) if index is None else index.astype(np.int64),
        sequence=np.repeat(np.arange(len(held)), held),
        lengths=lengths,
        held=held,
        columns=columns,
    )


def _packed_term(parts: Sequence[Part], index: np.ndarray, names: Sequence[str]) -> PackedTerm:
    lengths = [len(part.positions) for part in parts]
    return PackedTerm(
        index=index.astype(np.int64),
        sequence=np.repeat(np.arange(len(parts), dtype=np.int64), lengths),
        lengths=np.array(lengths, np.float32),
        held=np.array(lengths, np.int64),
        columns={
            name: np.concatenate(
                [np.zeros(0, np.float32)]
                + [np.broadcast_to(part.constants[name], len(part.positions)) for part in parts]
            ).astype(np.float32)
            for name in names
        },
    )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
