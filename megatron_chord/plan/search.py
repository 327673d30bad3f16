"""Searches the layouts that the trainer accepts, and ranks those that fit by the predicted time of a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_chord.costs.balance import balanced_stages
from megatron_chord.plan.estimate import Case, Choice, Estimate, estimate

_EQUAL = 0.01
_TRIED = 12
"""Layouts of each split that fit, and that do not fit, which are tried with other servers."""
_LEAST_BUDGET = 8192
"""Smaller micro-batches would leave a GPU idle between kernels."""


@dataclass(frozen=True, kw_only=True)
class Found:
    fitting: tuple[Estimate, ...]
    """The layouts that fit, fastest first. Layouts whose times differ by less than a hundredth of the fastest count as
    equal, because the prediction is no better. Among these, layouts whose experts stay within a node come first, then
    those with the fewest chunks, context ranks and stages, then those with equal stages, then those that need the least
    memory."""
    too_large: tuple[Estimate, ...]
    """Layouts that the trainer accepts but that do not fit the GPUs. The one that is closest to fitting comes first."""
    refused: tuple[str, ...]
    """The reasons why the trainer refuses other layouts, each reason once."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A layout together with the split of nodes and the servers, which are those of ``case``."""

    case: Case
    estimate: Estimate


def search(case: Case, start: Choice) -> Found:
    """Try sizes of all parallel axes, stages of equal length and stages of balanced work, token budgets and
    recomputation.

    The tensor axis stays within a node. All other settings are those of ``start``, and the servers those of ``case``.
    """
    sampling = case.sampling_seconds()
    fitting: list[Estimate] = []
    too_large: list[Estimate] = []
    refused: dict[str, None] = {}
    for choice in _choices(case, start):
        try:
            found = estimate(case, choice, sampling=sampling)
        except ValueError as error:
            refused[str(error)] = None
            continue
        (too_large if found.problems else fitting).append(found)
    fastest = min((one.times.step for one in fitting), default=1.0)
    return Found(
        fitting=tuple(sorted(fitting, key=lambda one: _rank(case, one, fastest))),
        too_large=tuple(sorted(too_large, key=_peak)),
        refused=tuple(refused),
    )


def search_servers(
    case: Case, start: Choice, *, host_memory: float | None = None
) -> tuple[Found, list[Placed]]:
    """Search the split of nodes, the servers' tensor axis and their share of GPU memory, beside the trainer's layout.

    For each split, ``search`` with the servers of ``case`` finds layouts; the fastest and those closest to fitting are
    estimated again with every kind of servers. If ``case`` has nodes that only sample, or one node, its split stays.

    Args:
        host_memory: bytes of main memory of a node; layouts that need more are left out.

    Returns:
        The first split's layouts, whose reasons explain why nothing fits; and all that fits, fastest first.
    """
    searched = [(split, search(split, start)) for split in _splits(case)]
    placed: list[Placed] = []
    for split, found in searched:
        near = [*found.fitting[:_TRIED], *found.too_large[:_TRIED]]
        for servers in _servers(split):
            sampling = servers.sampling_seconds()
            if math.isinf(sampling):
                continue
            tried = (estimate(servers, one.choice, sampling=sampling) for one in near)
            placed += [Placed(case=servers, estimate=one) for one in tried if not one.problems]
    placed = _smallest_shares(placed)
    if host_memory is not None:
        placed = [one for one in placed if one.estimate.host.total <= host_memory]
    fastest = min((one.estimate.times.step for one in placed), default=1.0)
    placed.sort(key=lambda one: _rank(one.case, one.estimate, fastest))
    return searched[0][1], placed


def _smallest_shares(placed: Sequence[Placed]) -> list[Placed]:
    """Keep one of the settings that differ only in the servers' share of memory: the fastest one. If several are
    equally fast, keep the one with the smallest share."""
    best: dict[tuple[object, ...], Placed] = {}
    for one in sorted(placed, key=lambda one: (round(one.estimate.times.step, 1), one.case.utilization)):
        best.setdefault((one.estimate.choice, one.case.rollout_tensor, one.case.cluster), one)
    return list(best.values())


def _splits(case: Case) -> Iterator[Case]:
    """The case with all nodes shared, and with a quarter, a half and three quarters of them for sampling alone.

    A stated ``rollout.offload`` is kept. A stated transport that needs servers beside the ranks keeps the nodes
    shared.
    """
    cluster = case.cluster
    must_share = case.transport in ("ipc", "file", "relay")
    if not case.work.sequences or cluster.nodes == 1 or not cluster.colocated or must_share:
        yield case
        return
    yield case
    for nodes in sorted({max(1, cluster.nodes * quarters // 4) for quarters in (1, 2, 3)}):
        apart = replace(cluster, rollout_nodes=nodes)
        if apart.rollout_gpus % case.rollout_tensor == 0:
            yield replace(case, cluster=apart, offload=bool(case.stated_offload))


def _servers(case: Case) -> Iterator[Case]:
    """The case with other servers: powers of two of GPUs within a node, and shares of their memory."""
    if not case.work.sequences:
        yield case
        return
    cluster = case.cluster
    tensors = [
        size
        for size in _powers(cluster.gpus_per_node)
        if cluster.rollout_gpus % size == 0 and case.shape.num_heads % size == 0
    ]
    shares = (0.3, 0.45, 0.6, 0.75) if cluster.colocated else (0.85,)
    if case.cache_bytes is not None:
        shares = ()
    for tensor in sorted({case.rollout_tensor, *tensors}):
        for share in sorted({case.utilization, *shares}):
            yield replace(case, rollout_tensor=tensor, utilization=share)


def best_block(found: Estimate, case: Case | None = None) -> str:
    """The layout as YAML to paste into a run. It states every axis, so that no axis of a ``base`` file remains. With
    ``case`` also the servers, and as a comment the split of nodes."""
    parallel = found.choice.parallel
    virtual = parallel.virtual_pipeline
    servers: list[str] = []
    if case is not None and case.work.sequences:
        apart = case.cluster.rollout_nodes
        servers = [
            "rollout:",
            f"  tensor: {case.rollout_tensor}",
            f"  gpu_memory_utilization: {case.utilization}",
            f"# nodes that only sample: CHORD_ROLLOUT_NODES={apart} of {case.cluster.nodes}",
        ]
    return "\n".join(
        [
            "parallel:",
            f"  tensor: {parallel.tensor}",
            f"  pipeline: {parallel.pipeline}",
            f"  virtual_pipeline: {'null' if virtual is None else virtual}",
            f"  stages: {'null' if parallel.stages is None else list(parallel.stages)}",
            f"  context: {parallel.context}",
            f"  expert: {parallel.expert}",
            f"  sequence_parallel: {str(parallel.sequence_parallel).lower()}",
            "batch:",
            f"  max_tokens_per_gpu: {found.choice.max_tokens}",
            "model:",
            f"  recompute: {found.choice.recompute}",
            *servers,
        ]
    )


def _choices(case: Case, start: Choice) -> Iterator[Choice]:
    gpus = case.cluster.train_gpus
    tensors = [size for size in _powers(case.cluster.gpus_per_node) if case.cluster.gpus_per_node % size == 0]
    contexts = [size for size in _powers(8) if size <= gpus]
    experts = [1] if case.shape.experts is None else _divisors(case.shape.experts.count)
    pipelines = [size for size in _divisors(gpus) if size <= case.shape.num_layers]
    for pipeline, recompute in itertools.product(pipelines, ("none", "mlp", "full")):
        stages = list(_stages(case, pipeline, recompute))
        for tensor, context, expert in itertools.product(tensors, contexts, experts):
            if gpus % (tensor * pipeline * context) or (gpus // pipeline) % expert:
                continue  # the axes do not divide the number of processes; the user needs no explanation for this
            for (chunks, lengths), budget in itertools.product(stages, _budgets(case, start)):
                parallel = replace(
                    start.parallel,
                    tensor=tensor,
                    pipeline=pipeline,
                    virtual_pipeline=chunks,
                    stages=lengths,
                    context=context,
                    expert=expert,
                    sequence_parallel=tensor > 1,
                )
                yield Choice(parallel=parallel, max_tokens=budget, recompute=recompute)


def _stages(case: Case, pipeline: int, recompute: str) -> Iterator[tuple[int | None, tuple[int, ...] | None]]:
    """Numbers of chunks per pipeline stage, with values of ``parallel.stages``: equal stages and balanced ones."""
    layers = case.shape.num_layers
    equal = [size for size in _divisors(layers // pipeline) if layers % (pipeline * size) == 0]
    for chunks in equal if pipeline > 1 else [1]:
        yield (chunks if chunks > 1 else None), None
    for chunks in _powers(layers // pipeline) if pipeline > 1 else []:
        found = balanced_stages(
            case.shape,
            pipeline=pipeline,
            chunks=chunks,
            length=case.work.length,
            recompute=recompute,
        )
        if len(set(found)) > 1:
            yield (chunks if chunks > 1 else None), found


def _budgets(case: Case, start: Choice) -> list[int]:
    """Token budgets to try: the longest sample rounded up, twice that, and that of the settings if the sample fits."""
    least = -(-max(case.work.longest, _LEAST_BUDGET) // 1024) * 1024
    own = [start.max_tokens] if start.max_tokens >= case.work.longest else []
    return sorted({least, 2 * least, *own})


def _rank(case: Case, found: Estimate, fastest: float) -> tuple[float, ...]:
    parallel = found.choice.parallel
    group = int((found.times.step / fastest - 1) / _EQUAL)
    chunks = parallel.virtual_pipeline or 1
    spread = parallel.expert > case.cluster.gpus_per_node
    is_unequal = parallel.stages is not None
    return group, spread, chunks * parallel.context * parallel.pipeline, is_unequal, _peak(found)


def _peak(found: Estimate) -> float:
    return max(found.training_peak, found.sampling_peak)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
