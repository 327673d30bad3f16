"""One optimizer update: compute the gradients of the objective, clip and apply them, reduce metrics over all ranks."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_chord.data.packing import PackedBatch
from megatron_chord.losses.noise import NoiseMeasurement
from megatron_chord.losses.objective import objective
from megatron_chord.losses.policy import COMPARED, ROLLOUT_LOGPROB
from megatron_chord.losses.terms import TEACHER_COLUMNS, Term, TermTokens, TokenStats, empty_output
from megatron_chord.model.forward import DeviceBatch, run_micro_batches, to_device
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.state import TrainState

Terms = Mapping[str, Term]


@dataclass(frozen=True, kw_only=True)
class Update:
    """The description of one optimizer update that every rank gets, in addition to its own micro-batches."""

    weights: Mapping[str, float]
    """Weight of each term, by its name."""
    counts: Mapping[str, int]
    """Number of trained tokens of each term over all ranks, by the term's name. Terms without a trained token are not
    listed."""
    noise: NoiseMeasurement | None = None
    """The additional noise measurement; None: no measurement."""
    is_extra: bool = False
    """True for the single update after the step's other updates, which has an optimizer state and a learning rate of
    its own (``train.second_adam``)."""


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """Loss and metrics of an update, equal on every rank. Terms without a token have no metrics."""

    loss: float
    means: dict[str, float]
    maxima: dict[str, float]
    compared: dict[str, float] = field(default_factory=dict[str, float])
    """The values of ``losses.policy.comparison``, summed over all tokens that have rollout log-probs."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Loss and metrics of an update, still on the device."""

    values: Tensor
    finish: Callable[[list[float]], UpdateResult]

    @functools.cached_property
    def result(self) -> UpdateResult:
        """Copy the numbers to the host, which waits for the device. The result is cached."""
        return self.finish(self.values.tolist())


def prepare_batches(
    state: TrainState, micro_batches: Sequence[PackedBatch], terms: Terms, *, temperature: float
) -> list[DeviceBatch]:
    """This data-parallel rank's micro-batches on the device, with the columns that are computed before the update.

    If a term needs scored columns (``Term.scored``), this makes the forward passes of ``losses.terms.PASSES`` that
    compute them. Otherwise it makes no pass.
    """
    layers = state.routed_layers()
    batches = [to_device(batch, state.groups, layers) for batch in micro_batches]
    present = {name: terms[name] for name in batches[0].terms}
    wanted = {column for term in present.values() for column in term.scored}
    if not wanted:
        return batches
    temperatures = _temperatures(present, temperature)
    columns: list[dict[str, Tensor]] = [{} for _ in batches]
    if wanted & {"old_logprob", "old_entropy"}:
        for scores, found in zip(_scores(state, state.chunks, batches, temperatures), columns, strict=False):
            found |= {"old_logprob": scores["logprobs"], "old_entropy": scores["entropy"]}
    if "reference_logprob" in wanted:
        for scores, found in zip(
            _scores(state, state.reference, batches, temperatures), columns, strict=False
        ):
            found["reference_logprob"] = scores["logprobs"]
    for column in sorted(wanted.intersection(TEACHER_COLUMNS.values())):
        with _teacher_weights(state, column) as chunks:
            scored = _teacher_scores(state, chunks, batches, temperatures)
        for logprobs, found in zip(scored, columns, strict=False):
            found[column] = logprobs
    if not state.groups.is_last_stage:
        return batches
    batches = [_with_columns(batch, present, found) for batch, found in zip(batches, columns, strict=True)]
    across = _Across(state.groups)
    for name, term in present.items():
        if term.prepare is None:
            continue
        added = term.prepare([batch.terms[name] for batch in batches], across)
        batches = [
            replace(batch, terms={**batch.terms, name: _extended(batch.terms[name], new)})
            for batch, new in zip(batches, added, strict=True)
        ]
    return batches


def compute_gradients(
    state: TrainState,
    batches: Sequence[DeviceBatch],
    update: Update,
    terms: Terms,
    *,
    temperature: float,
) -> Measured:
    """Compute the loss of the update, and its gradients in the parameters' ``main_grad``. Changes no weight.

    Args:
        batches: this data-parallel rank's micro-batches; every rank has the same number.
        update: equal on every rank.

    Collectives: those of Megatron's schedule and gradient reduction, and 1 all-reduce over all ranks.
    """
    present = {name: terms[name] for name in batches[0].terms}

    def loss(stats: TokenStats, tokens: Mapping[str, TermTokens]) -> tuple[Tensor, dict[str, Any]]:
        share = objective(stats, tokens, present, update.weights)
        kept = {"loss": share.loss.detach().clone(), "sums": share.sums, "maxima": share.maxima}
        return share.loss, kept | ({"noise": update.noise.sums(stats, tokens)} if update.noise else {})

    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    kept = run_micro_batches(
        state.chunks,
        batches,
        loss,
        groups=state.groups,
        vocab_size=state.shape.vocab_size,
        temperatures=_temperatures(present, temperature),
        rival=any(term.rival for term in present.values()),
    )
    compared = {name for name, tokens in batches[0].terms.items() if ROLLOUT_LOGPROB in tokens.columns}
    return _reduce(kept, update, present, compared, state.groups)


def apply_gradients(state: TrainState, *, new_step: bool = True, skip: bool = False) -> tuple[float, float]:
    """Clip the gradients and update the weights. Returns the gradient norm before clipping and the learning rate.

    With ``new_step`` the learning-rate schedule first advances by a step; so the first step of a warm-up does not have
    the rate 0. With ``skip`` the weights do not change. It is used for updates without a trained token, where only
    momentum and weight decay would change the weights.
    """
    if new_step:
        state.scheduler.step(1)
    learning_rate = max(group["lr"] for group in state.optimizer.param_groups)
    if skip:
        return 0.0, float(learning_rate)
    succeeded, grad_norm, _ = state.optimizer.step()
    assert succeeded, "only fp16 loss scaling skips steps"
    state.optimizer.zero_grad()
    return float(grad_norm or 0.0), float(learning_rate)


def mean_result(results: Sequence[UpdateResult]) -> UpdateResult:
    """Combine the results of a step's updates: the mean of each metric over the updates that have it, and the maxima.

    The comparison with the rollout engine is that of the first update. Later updates train changed weights, so their
    log-probs are expected to differ.
    """
    first = results[0]
    means = {
        name: statistics.fmean([result.means[name] for result in results if name in result.means])
        for name in dict.fromkeys(name for result in results for name in result.means)
    }
    peaks = dict.fromkeys(name for result in results for name in result.maxima)
    maxima = {name: largest(result.maxima.get(name, 0.0) for result in results) for name in peaks}
    return UpdateResult(
        loss=statistics.fmean(result.loss for result in results),
        means=means
        | {name: first.means[name] for name in ("logprob_gap", "probability_error") if name in first.means},
        maxima=maxima | {name: first.maxima[name] for name in ("logprob_gap_max",) if name in first.maxima},
        compared=first.compared,
    )


def _temperatures(terms: Terms, of_sampling: float) -> dict[str, float]:
    return {
        name: of_sampling if term.temperature is None else term.temperature for name, term in terms.items()
    }


def largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if any value is NaN. The result of Python's ``max`` would depend on the order."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def _scores(
    state: TrainState,
    chunks: Sequence[Any],
    batches: Sequence[DeviceBatch],
    temperatures: Mapping[str, float],
) -> list[dict[str, Tensor]]:
    """Log-probs and entropies [T] of every micro-batch's trained tokens; empty on all but the last stage."""

    def keep(stats: TokenStats, tokens: Mapping[str, TermTokens]) -> tuple[Tensor, dict[str, Tensor]]:
        return stats.logprobs.sum(), {"logprobs": stats.logprobs, "entropy": stats.entropy}

    return run_micro_batches(
        chunks,
        batches,
        keep,
        groups=state.groups,
        vocab_size=state.shape.vocab_size,
        temperatures=temperatures,
        backward=False,
    )


@contextmanager
def _teacher_weights(state: TrainState, column: str) -> Iterator[Sequence[Any]]:
    """The model chunks that compute ``column`` within the context."""
    if column == TEACHER_COLUMNS["averaged"]:
        assert state.averaged is not None
        with state.averaged.active():
            yield state.chunks
    else:
        yield state.reference if column == TEACHER_COLUMNS["initial"] else state.chunks


def _teacher_scores(
    state: TrainState,
    chunks: Sequence[Any],
    batches: Sequence[DeviceBatch],
    temperatures: Mapping[str, float],
) -> list[Tensor]:
    """Log-probs [T] of every micro-batch's trained tokens after their teachers' prompts, 0 for tokens without a
    teacher; empty on all but the last stage.

    Collectives: those of a forward pass, and an all-reduce over the context-parallel ranks for each micro-batch.
    """
    teachers = [batch.teacher for batch in batches if batch.teacher is not None]
    if not teachers:
        return [torch.zeros_like(batch.targets, dtype=torch.float32) for batch in batches]
    scores = _scores(state, chunks, [teacher.batch for teacher in teachers], temperatures)
    found: list[Tensor] = []
    for teacher, score in zip(teachers, scores, strict=False):
        logprobs = score["logprobs"]
        whole = logprobs.new_zeros(teacher.num_trained).index_copy_(0, teacher.slots, logprobs)
        if state.groups.context.size > 1:
            dist.all_reduce(whole, group=state.groups.context.group)
        found.append(whole[teacher.own])
    return found


def _with_columns(batch: DeviceBatch, terms: Terms, found: Mapping[str, Tensor]) -> DeviceBatch:
    """Add to each term the columns that it needs, at its tokens. ``found`` has the columns of all tokens, [T] each."""
    return replace(
        batch,
        terms={
            name: _extended(tokens, {key: found[key][tokens.index] for key in terms[name].scored})
            for name, tokens in batch.terms.items()
        },
    )


def _extended(tokens: TermTokens, columns: Mapping[str, Tensor]) -> TermTokens:
    return replace(tokens, columns={**tokens.columns, **columns})


class _Across:
    """Implements ``AcrossRanks`` over all ranks that hold tokens of the update."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._replicas = groups.replicas
        self._host = groups.replicas_host

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=self._replicas.group)
        return total

    def collect(self, values: Tensor) -> Tensor:
        # The lengths are known on the host, so this does not wait for the device.
        lengths: list[Any] = [None] * self._replicas.size
        dist.all_gather_object(lengths, len(values), group=self._host)
        padded = torch.cat([values, values.new_zeros(max(lengths) - len(values))])
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self._replicas.group)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _reduce(
    kept: Sequence[dict[str, Any]],
    update: Update,
    terms: Terms,
    compared_terms: Set[str],
    groups: ParallelGroups,
) -> Measured:
    """Sum the numbers of the last pipeline stage's ranks. Each token counts once. One all-reduce over all ranks.

    ``compared_terms`` are the terms whose tokens have rollout log-probs; equal on every rank. Every replica writes its
    maxima to a separate row, so that the sum contains the maxima of all.
    """
    outputs = {name: empty_output(term) for name, term in terms.items()}
    names = [
        (term, key)
        for term, output in outputs.items()
        for key in (*output.losses, *output.means, *(COMPARED if term in compared_terms else ()))
    ]
    peaks = [key for output in outputs.values() for key in output.maxima]
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=groups.device)
    noise = torch.zeros(update.noise.size if update.noise else 0, dtype=torch.float64, device=groups.device)
    rows = torch.zeros(groups.replicas.size, len(peaks), dtype=torch.float64, device=groups.device)
    if groups.is_last_stage and groups.tensor.rank == 0:
        sums = _stacked(
            [[row["loss"], *(row["sums"][term][key] for term, key in names)] for row in kept]
        ).sum(0)
        if peaks:
            rows[groups.replicas.rank] = _stacked(
                [[row["maxima"][key] for key in peaks] for row in kept]
            ).amax(0)
        if update.noise:
            noise = torch.stack([row["noise"] for row in kept]).sum(0)
    values = torch.cat([sums, rows.flatten(), noise])
    dist.all_reduce(values)

    def finish(numbers: list[float]) -> UpdateResult:
        loss, *rest = numbers
        totals, found = rest[: len(names)], rest[len(names) : len(names) + rows.numel()]
        means: dict[str, float] = {}
        compared: dict[str, float] = {}
        for (term, key), total in zip(names, totals, strict=True):
            if key in COMPARED:
                compared[key] = compared.get(key, 0.0) + total
            else:
                means[key] = total / (update.counts[term] if key in outputs[term].means else 1)
        maxima = {key: largest(found[place :: len(peaks)]) for place, key in enumerate(peaks)}
        if update.noise:
            means |= update.noise.finish(rest[len(names) + rows.numel() :])
        return UpdateResult(loss=loss, means=means, maxima=maxima, compared=compared)

    return Measured(values=values, finish=finish)


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Stack scalars to [rows, columns] in float64, with two kernels for any number of scalars."""
    return torch.stack([value for row in rows for value in row]).double().view(len(rows), -1)
