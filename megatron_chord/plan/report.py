"""Formats an estimate as text tables and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from megatron_chord.costs.parameters import model_count
from megatron_chord.plan.constants import GB
from megatron_chord.plan.estimate import Case, Estimate, checkpoint_bytes, disk_bytes, export_bytes
from megatron_chord.plan.memory import gb
from megatron_chord.plan.search import Found, Placed, best_block

_SHOWN = 10
_MISSES = 3


def tables(case: Case, found: Estimate) -> Iterator[Table]:
    yield _memory(case, found)
    yield _time(case, found)
    yield _capacity(case, found)


def search_table(found: Sequence[Placed]) -> Table:
    shown = found[:_SHOWN]
    table = Table(title=f"{len(found)} layouts fit; the fastest by prediction")
    if any(one.estimate.choice.parallel.stages for one in shown):
        table.caption = "* stages of unequal length: with --json, parallel.stages"
    left = ("layout", "recompute", "servers")
    for name in ("layout", "recompute", "tokens", "servers", "step s", "train s", "peak GB"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for placed in shown:
        one = placed.estimate
        table.add_row(
            layout(one),
            one.choice.recompute,
            str(one.choice.max_tokens),
            _servers(placed.case),
            f"{one.times.step:.1f}",
            f"{one.times.trainer:.1f}",
            f"{max(one.training_peak, one.sampling_peak) / GB:.1f}",
        )
    return table


def _servers(case: Case) -> str:
    """The servers as text, such as 8 x TP4 0.85 on 4 nodes."""
    if not case.work.sequences:
        return "none"
    where = f" on {case.cluster.rollout_nodes} nodes" if case.cluster.rollout_nodes else ""
    return f"{case.servers} x TP{case.rollout_tensor} {case.utilization:g}{where}"


def reasons(found: Found) -> Iterator[str]:
    """Why nothing fits: the layouts that are closest to fitting, then the reasons why the trainer refuses others."""
    yield "no layout fits"
    nearest: dict[tuple[int, ...], Estimate] = {}
    for one in found.too_large:
        parallel = one.choice.parallel
        nearest.setdefault((parallel.tensor, parallel.pipeline, parallel.context, parallel.expert), one)
    for one in list(nearest.values())[:_MISSES]:
        name = f"{layout(one)}, recompute {one.choice.recompute}, {one.choice.max_tokens} tokens"
        yield from (f"  {name}: {problem}" for problem in one.problems)
    yield from (f"  refused: {reason}" for reason in found.refused[:_MISSES])


def layout(found: Estimate) -> str:
    """A layout as text, such as TP4 PP2 DP8. Axes of size 1 are left out. PP2* has stages of unequal length."""
    parallel = found.choice.parallel
    axes = {
        "TP": str(parallel.tensor),
        "PP": f"{parallel.pipeline}{'*' if parallel.stages else ''}",
        "VPP": str(parallel.virtual_pipeline or 1),
        "CP": str(parallel.context),
        "EP": str(parallel.expert),
    }
    named = [f"{name}{size}" for name, size in axes.items() if size != "1"]
    return " ".join([*named, f"DP{found.training.data}"])


def as_plain(case: Case, found: Estimate) -> dict[str, Any]:
    """The estimate as numbers in bytes, seconds and tokens."""
    parallel, server = found.choice.parallel, found.server
    return {
        "parameters": model_count(case.shape),
        "parallel": {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "stages": parallel.stages,
            "context": parallel.context,
            "expert": parallel.expert,
            "sequence_parallel": parallel.sequence_parallel,
            "data": found.training.data,
        },
        "max_tokens": found.choice.max_tokens,
        "recompute": found.choice.recompute,
        "fits": not found.problems,
        "problems": list(found.problems),
        "memory": {
            "gpu": case.cluster.gpu.memory,
            "worst_stage": found.worst.stage,
            **found.worst.parts(),
            "peer_contexts": case.peer_contexts,
            "push_buffers": case.push_buffers,
            "training_peak": found.training_peak,
            "sampling_peak": found.sampling_peak,
            "main_memory": found.saved,
        },
        "server": None
        if server is None
        else {
            "servers": case.servers,
            "tensor": server.tensor,
            "weights": server.weights,
            "kv_cache": server.cache,
            "kv_tokens": server.tokens,
        },
        "host_memory": {
            "offloaded": found.host.offloaded,
            "staged": found.host.staged,
            "processes": found.host.processes,
            "states": found.host.states,
            "routes": found.host.routes,
        },
        "warnings": list(found.warnings),
        "transport": case.chosen_transport,
        "seconds": {
            "step": _finite(found.times.step),
            "sampling": _finite(found.times.sampling),
            "scoring": found.times.scoring,
            "training": found.times.training,
            "reduction": found.times.reduction,
            "sync": found.times.sync,
            "offload": found.times.offload,
        },
        "micro_batches": found.training.micro_batches,
        "bubble": found.speed.bubble,
        "mfu": found.mfu,
        "tokens_per_s": found.tokens_per_s,
        "checkpoint_bytes": checkpoint_bytes(case),
        "disk_bytes": disk_bytes(case),
        "export_bytes": export_bytes(case),
    }


def search_as_plain(found: Found, placed: Sequence[Placed]) -> dict[str, Any]:
    return {
        "fitting": [
            {
                **as_plain(one.case, one.estimate),
                "rollout_tensor": one.case.rollout_tensor,
                "gpu_memory_utilization": one.case.utilization,
                "rollout_nodes": one.case.cluster.rollout_nodes,
            }
            for one in placed[:_SHOWN]
        ],
        "number_fitting": len(placed),
        "block": best_block(placed[0].estimate, placed[0].case) if placed else None,
        "reasons": [] if placed else list(reasons(found)),
    }


def _memory(case: Case, found: Estimate) -> Table:
    worst, cluster = found.worst, case.cluster
    where = f"stage {worst.stage} of {found.choice.parallel.pipeline}"
    table = _two_columns(
        f"memory of one {cluster.gpu.name} ({gb(cluster.gpu.memory)}), {where}: {worst.parameters / 1e9:.2f} billion "
        "parameters"
    )
    for name, value in worst.parts().items():
        if value:
            table.add_row(_NAMES[name], gb(value))
    if found.server and cluster.colocated:
        table.add_row("vLLM, asleep", gb(case.constants.asleep_bytes))
        if case.uses_ipc:
            table.add_row("reserve for servers on other GPUs of the node", gb(case.peer_contexts))
            table.add_row("buffers of weight pushes", gb(case.push_buffers))
    table.add_row("training, together", gb(found.training_peak), end_section=True)
    if found.server:
        table.add_row("vLLM: weights", gb(found.server.weights))
        table.add_row("vLLM: KV cache", gb(found.server.cache))
        table.add_row("vLLM: all it reserves", gb(found.server.reserved))
        if cluster.colocated:
            kept = "weights" if case.offload else "state"
            table.add_row(f"with the trainer's {kept} beside it", gb(found.sampling_peak))
        if case.offload:
            table.add_row("meanwhile in main memory, of each GPU", gb(found.saved))
    return table


_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "reference": "reference model",
    "activations": "activations",
    "head": "log-prob head, a chunk at a time",
    "overhead": "CUDA, NCCL, fragmentation",
}


def _time(case: Case, found: Estimate) -> Table:
    times = found.times
    table = _two_columns(f"one step of {case.work.tokens:,.0f} tokens")
    for name, value in {
        "sampling": times.sampling,
        "log-probs": times.scoring,
        "training": times.training,
        "gradients and weights between ranks": times.reduction,
        f"weight push ({case.chosen_transport})": times.sync,
        **({"optimizer state to main memory and back": times.offload} if case.offload else {}),
    }.items():
        table.add_row(name, _seconds(value))
    table.add_row("step", _seconds(times.step), end_section=True)
    table.add_row("tokens/s", f"{found.tokens_per_s:,.0f}" if _finite(times.step) else _NEVER)
    table.add_row("micro-batches on each data-parallel rank", f"{found.training.micro_batches}")
    table.add_row("pipeline bubble", f"{found.speed.bubble:.1%}")
    table.add_row("MFU of training", f"{found.mfu:.1%}")
    return table


def _capacity(case: Case, found: Estimate) -> Table:
    table = _two_columns("capacity")
    if found.server:
        work, tokens = case.work, found.server.tokens
        mean = work.prompt_tokens + work.response_tokens
        table.add_row("rollout servers", f"{case.servers} of {found.server.tensor} GPUs")
        table.add_row("KV cache of a server", f"{tokens:,} tokens")
        table.add_row("samples at once, of mean length", f"{tokens / mean:,.0f}")
        table.add_row("samples at once, of the longest", f"{tokens // work.longest:,}")
        table.add_row("samples of a step for each server", f"{work.sequences / case.servers:,.0f}")
    table.add_row("main memory of a node: offloaded, pinned", gb(found.host.offloaded))
    table.add_row("main memory of a node: a checkpoint being written", gb(found.host.staged))
    table.add_row("main memory of a node: ranks and servers", gb(found.host.processes))
    if found.host.states:
        table.add_row(
            "main memory of a node: moments of extra updates, averaged weights", gb(found.host.states)
        )
    if found.host.routes:
        table.add_row("main memory of a node: routes of a step", gb(found.host.routes))
    table.add_row("main memory of a node: together", gb(found.host.total), end_section=True)
    table.add_row("one checkpoint on disk", gb(checkpoint_bytes(case)))
    table.add_row(f"the {case.kept_checkpoints} kept, and the one being written", gb(disk_bytes(case)))
    table.add_row("the exported folder", gb(export_bytes(case)))
    return table


_NEVER = "never: does not fit"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if math.isfinite(value) else _NEVER


def _finite(value: float) -> float | None:
    """None instead of inf, which JSON does not have."""
    return value if math.isfinite(value) else None


def _two_columns(title: str, names: Sequence[str] = ("", "")) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(names[0])
    table.add_column(names[1], justify="right")
    return table
