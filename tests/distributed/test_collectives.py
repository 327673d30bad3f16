"""The collectives of one update are those that docs/performance.md states: counted on two ranks with a model of two
layers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_chord.config import OptimConfig, ParallelConfig
from megatron_chord.losses.policy import COMPARED
from megatron_chord.losses.terms import empty_output
from megatron_chord.train.state import TrainState
from tests.distributed.steps import build
from tests.distributed.watched import LENGTH, MICRO_BATCHES, PRESETS, TRAINED, preset, watched_step
from tests.support.ranks import ROOT, run_ranks
from tests.support.tiny import save_model, terms_of

LAYERS, HIDDEN, KEYS = 2, 64, 32
"""Sizes of the model of tests.support.tiny. KEYS is two key-value heads of 16."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "data, plain optimizer": {"distributed_optimizer": False},
    "tensor": {"tensor": 2},
    "tensor, sequence": {"tensor": 2, "sequence_parallel": True},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
}
EXPERTS = {"experts": {"expert": 2}}
KINDS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall_base": "all-to-all",
    "send": "send",
    "recv": "receive",
}
Calls = dict[tuple[str, str, int], int]
"""The number of calls by (group, kind, numbers in a call). A call whose size the router decides counts as 0 numbers."""


def stated() -> list[dict[str, str]]:
    """The rows of the table in docs/performance.md."""
    text = (ROOT / "docs" / "performance.md").read_text()
    header, _, *rows = text.split("<!-- collectives -->\n")[1].splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    return [
        dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows
    ]


def value(formula: str, symbols: dict[str, int]) -> int:
    """Evaluate a sum of products such as ``4 L + 2``. It may hold one ``/``, which divides the whole sum."""
    formula, _, divisor = formula.partition("/")
    total = sum(math.prod(_factor(factor, symbols) for factor in term.split()) for term in formula.split("+"))
    return total // (_factor(divisor.strip(), symbols) if divisor else 1)


def _factor(text: str, symbols: dict[str, int]) -> int:
    return int(text) if text.isdigit() else symbols[text]


def expected(layout: str, symbols: dict[str, int]) -> Calls:
    calls: Counter[tuple[str, str, int]] = Counter()
    for row in stated():
        if layout not in row["layout"].split("; ") and row["layout"] != "any":
            continue
        often = sum(
            value(row[per] or "0", symbols) * times
            for per, times in (("a micro-batch", MICRO_BATCHES), ("an update", 1))
        )
        for group, numbers in zip(row["group"].split("; "), row["numbers"].split("; "), strict=True):
            calls[group, row["kind"], value(numbers, symbols)] += often
    return dict(calls)


def symbols_of(state: TrainState) -> dict[str, int]:
    """The values of the letters in the table."""
    run = preset(PRESETS["chord_phi"])
    outputs = [empty_output(term) for term in terms_of(run).values()]
    groups = state.groups
    tokens = 2 * LENGTH // groups.context.size
    return {
        "L": LAYERS,
        "N": tokens,
        "H": HIDDEN,
        "K": KEYS,
        "T": 2 * 2 * TRAINED,
        "P": sum(buffer.numel for chunk in state.chunks for buffer in chunk.buffers),
        "Q": sum(buffer.numel for chunk in state.chunks for buffer in chunk.expert_parallel_buffers),
        "X": 4,
        "routed": 0,
        "norms": (2 * LAYERS + 1) * HIDDEN,
        "n": sum(len(output.losses) + len(output.means) for output in outputs),
        "s": len(COMPARED),
        "m": sum(len(output.maxima) for output in outputs),
        "t": groups.tensor.size,
        "c": groups.context.size,
        "r": groups.replicas.size,
        "e": groups.expert_replicas.size,
    }


def counted(folder: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, tuple[Calls, dict[str, int]]]:
    """Return, for each layout, this rank's calls in one step of CHORD and the values of the table's letters."""
    from megatron.core import parallel_state

    run, found = preset(PRESETS["chord_phi"]), {}
    for name, axes in layouts.items():
        parallel = ParallelConfig(**axes)
        state = build(folder, parallel, OptimConfig())
        groups = state.groups
        known = {
            "tensor": groups.tensor.group,
            "pipeline": groups.pipeline.group,
            "context": groups.context.group,
            "replicas": groups.replicas.group,
            "expert": groups.expert.group,
            "expert replicas": groups.expert_replicas.group,
            "norm": state.optimizer.get_grad_stats_parallel_group(),
        }
        names = {group.group_name: axis for axis, group in known.items()} | {"0": "world"}
        # This group joins the expert and the tensor axis. The tensor axis has one rank here.
        names[parallel_state.get_expert_tensor_and_model_parallel_group().group_name] = "expert"
        sent = watched_step(run, state, parallel).sent
        calls = Counter(
            (names[call.group], KINDS[call.kind], 0 if call.kind == "alltoall_base" else call.numel)
            for call in sent
        )
        found[name] = (dict(calls), symbols_of(state))
    return found


def test_an_update_sends_what_the_documentation_says(tmp_path: Path) -> None:
    models = {"qwen2": LAYOUTS, "qwen3_moe": EXPERTS}
    for family, layouts in models.items():
        folder = save_model(family, tmp_path / family, layers=LAYERS)
        for found in run_ranks(counted, 2, folder, layouts):
            assert list(found) == list(layouts)
            for layout, (calls, symbols) in found.items():
                assert calls == expected(layout, symbols), layout


def test_formulas() -> None:
    assert value("4 L + 2", {"L": 3}) == 14
    assert value("N H / t", {"N": 6, "H": 5, "t": 2}) == 15
    assert value("1 + n + r m", {"n": 10, "r": 2, "m": 1}) == 13
