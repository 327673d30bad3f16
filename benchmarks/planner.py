#!/usr/bin/env python
"""Compare the planner with the published runs of planner_rows.yaml: predicted, published, and the error.

    python benchmarks/planner.py

Fitted rows and unseen rows are printed apart: the constants were fitted by benchmarks/planner_fit.py, which sees only
the fitted ones. Rows outside are runs that the planner does not model. The exit code is 1 if the median error of the
unseen rows is above 15 % or one of them is above 35 %.
docs/planning.md has the sources.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.balance import balanced_stages, slowdown
from megatron_chord.costs.flops import train_flops
from megatron_chord.costs.gpus import GPUS
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import FAMILIES, read_shape
from megatron_chord.plan.constants import CONSTANTS, GB, Constants
from megatron_chord.plan.estimate import Case, Choice, Cluster, checkpoint_bytes, estimate
from megatron_chord.plan.memory import Numerics, Training, full_logits_bytes, stage_memory
from megatron_chord.plan.training import reduction_seconds, speed
from megatron_chord.plan.work import Work

MEDIAN, LARGEST = 0.15, 0.35
"""The errors that the unseen rows should not exceed."""
ROWS = Path(__file__).with_name("planner_rows.yaml")
CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "support" / "configs"
_OUTSIDE = (
    "not modelled: these runs send tokens to experts by HybridEP (26.04) or by all-gather (NeMo-RL v0.4), this trainer "
    "by all-to-all"
)
Use = Literal["fitted", "unseen", "outside"]
PROMPT_TOKENS = 127
"""Tokens of a prompt of the GRPO rows, derived from comparing the published columns."""


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    what: str
    published: float
    predicted: float
    unit: str
    source: str
    use: Use

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def rows(constants: Constants = CONSTANTS, *, use: Use | None = None) -> list[Row]:
    """All rows, or those of one use, predicted with these constants."""
    found: list[Row] = []
    for kind, predict in _KINDS.items():
        for entry in _entries()[kind]:
            if use in (None, entry["use"]):
                found += predict(entry, constants)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.table import Table

    found = rows()
    uses: tuple[Use, ...] = ("fitted", "unseen", "outside")
    for use in uses:
        table = Table(title=f"{use} rows", caption=_OUTSIDE if use == "outside" else None)
        for name in ("run", "what", "predicted", "published", "unit", "error %", "source"):
            table.add_column(
                name, justify="right" if name in ("predicted", "published", "error %") else "left"
            )
        for row in (row for row in found if row.use == use):
            numbers = [
                f"{value:.1f}" if value >= 10 else f"{value:.3f}" for value in (row.predicted, row.published)
            ]
            table.add_row(row.name, row.what, *numbers, row.unit, f"{100 * row.error:+.1f}", row.source)
        Console(width=130).print(table)
    for use in uses:
        print(f"{use}: {summary([row for row in found if row.use == use])}")
    missed = [row for row in found if row.use == "unseen" and abs(row.error) > LARGEST]
    median = statistics.median(abs(row.error) for row in found if row.use == "unseen")
    for row in missed:
        print(f"above {LARGEST:.0%}: {row.name}, {row.what}: {row.error:+.1%}")
    passed = median <= MEDIAN and not missed
    print("PASS" if passed else "FAIL")
    return int(not passed)


def summary(found: Sequence[Row]) -> str:
    errors = [abs(row.error) for row in found]
    within = sum(error <= 0.20 for error in errors)
    return (
        f"{len(errors)} figures, median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, "
        f"{within} within 20 %"
    )


@cache
def _entries() -> dict[str, list[dict[str, Any]]]:
    return yaml.safe_load(ROWS.read_text())


@cache
def _shape(name: str) -> ModelShape:
    return gpt_7b() if name == "gpt-7b" else read_shape(CONFIGS / name)


def _parallel(entry: dict[str, Any]) -> ParallelConfig:
    pipeline = entry.get("pipeline", 1)
    chunks = entry.get("virtual")
    stages, shape = None, _shape(entry["model"])
    if "layers" in entry:
        first, last = entry["layers"]
        between = shape.num_layers - first - last
        stages = (first, *[between // (pipeline - 2)] * (pipeline - 2), last)
    elif shape.num_layers % (pipeline * (chunks or 1)):
        # These recipes count the embedding and the head as layers.
        stages = balanced_stages(
            shape, pipeline=pipeline, chunks=chunks or 1, length=entry["length"], recompute="none"
        )
    return ParallelConfig(
        tensor=entry.get("tensor", 1),
        pipeline=pipeline,
        virtual_pipeline=chunks,
        stages=stages,
        context=entry.get("context", 1),
        expert=entry.get("expert", 1),
        sequence_parallel=entry.get("sequence", entry.get("tensor", 1) > 1),
    )


def _train(entry: dict[str, Any], constants: Constants) -> list[Row]:
    shape, parallel, gpu = _shape(entry["model"]), _parallel(entry), GPUS[entry.get("gpu", "h100")]
    ranks = entry["gpus"] // (parallel.tensor * parallel.pipeline * parallel.context)
    how = speed(
        shape,
        parallel,
        gpu,
        micro_batches=entry["batch"] // (ranks * entry.get("micro", 1)),
        slowdown=slowdown(shape, parallel, length=entry["length"], recompute="none", head_passes=1),
        fp8=entry.get("fp8", False),
        long_packs=True,
        constants=constants,
    )
    tokens, per_token = entry["batch"] * entry["length"], train_flops(shape, entry["length"])
    seconds = tokens * per_token / (entry["gpus"] * gpu.peak_flops * how.efficiency)
    seconds += reduction_seconds(
        shape,
        parallel,
        gpu,
        gpus=entry["gpus"],
        # FP8: gradients in BF16, and FP8 weights. Megatron-LM in BF16: gradients in FP32.
        parameter_bytes=3 if entry.get("fp8") else 6,
        constants=constants,
    )
    reached = tokens / (entry["gpus"] * seconds)
    predicted = {"tok/s": reached, "TFLOP/s": reached * per_token / 1e12, "s": seconds}
    return [_row(entry, "iteration" if entry["unit"] == "s" else "per GPU", predicted[entry["unit"]])]


def _grpo(entry: dict[str, Any], constants: Constants) -> list[Row]:
    case, choice = grpo_case(entry, constants)
    times = estimate(case, choice, sampling=_sampling(entry["name"], _decoding(constants))).times
    found = [_row({**entry, "value": entry["seconds"], "unit": "s"}, "step", times.step)]
    for phase, seconds in entry.get("phases", {}).items():
        predicted = getattr(times, phase) + (times.reduction if phase == "training" else 0.0)
        found.append(_row({**entry, "value": seconds, "unit": "s"}, phase, predicted))
    return found


def grpo_case(entry: dict[str, Any], constants: Constants = CONSTANTS) -> tuple[Case, Choice]:
    """A GRPO run of NeMo-RL and its layout: two log-prob passes, of the policy and of the reference."""
    apart, nodes = entry.get("apart", False), entry["gpus"] // 8
    samples, limit = entry.get("samples", 2048), entry.get("limit", 4096)
    per_prompt = 16 if entry["model"] == "deepseek-v3" else 32
    case = Case(
        shape=_shape(entry["model"]),
        cluster=Cluster(gpu=GPUS["h100"], nodes=nodes * (1 + apart), rollout_nodes=nodes if apart else 0),
        work=Work(
            prompts=samples // per_prompt,
            rollouts=per_prompt,
            demonstrations=0,
            prompt_tokens=PROMPT_TOKENS,
            response_tokens=entry["mean"] - PROMPT_TOKENS,
            demonstration_tokens=0,
            response_limit=limit - PROMPT_TOKENS,
            longest=limit,
            updates=samples // 512,
            passes=2,
        ),
        reference=True,
        precision="fp8_e2e" if entry.get("fp8") else None,
        rollout_tensor=entry.get("sampling", 1),
        utilization=0.8 if apart else 0.6,
        overlap=apart,
        # NeMo-RL gathers over NCCL, and hands weights to the servers of a node over CUDA IPC.
        transport="broadcast" if apart else "ipc",
        constants=dataclasses.replace(constants, head_passes=1.0),
    )
    recompute = entry.get("recompute", "none")
    return case, Choice(parallel=_parallel(entry), max_tokens=limit, recompute=recompute)


def _decoding(constants: Constants) -> Constants:
    """Constants that differ from the default ones only in what sampling depends on."""
    names = [field.name for field in dataclasses.fields(Constants) if field.name.startswith("decode_")]
    return dataclasses.replace(CONSTANTS, **{name: getattr(constants, name) for name in names})


@cache
def _sampling(name: str, constants: Constants) -> float:
    (entry,) = (entry for entry in _entries()["grpo"] if entry["name"] == name)
    return grpo_case(entry, constants)[0].sampling_seconds()


def _memory(entry: dict[str, Any], constants: Constants) -> list[Row]:
    shape, parallel = _shape(entry["model"]), _parallel(entry)
    tokens = entry.get("micro", 1) * entry["length"]
    training = Training(
        parallel=parallel,
        data=entry["data"],
        micro_tokens=tokens,
        micro_batches=entry["batches"],
        recompute="none",
        # FP8 weights (kept as FP8; a transposed copy exists for a moment) and BF16 gradients.
        numerics=Numerics(weights=1, gradients=2, gemm_input=1) if entry.get("fp8") else Numerics(),
    )
    inside = dataclasses.replace(constants, cuda_bytes=0.0, fragmentation=0.0)
    memory = stage_memory(shape, training, 0, inside)
    held, peak = memory.static, memory.total
    if entry["model"] == "gpt-7b":
        # Learned positions are whole on every rank of the first stage. No family here has them.
        held += (2 + 4 + 12 / 2) * 8192 * shape.hidden_size
        is_last = parallel.pipeline == 1
        logits = full_logits_bytes(shape.vocab_size / parallel.tensor, tokens) if is_last else 0.0
        peak = held + memory.activations + logits
    value = {"held": held, "peak": peak}[entry["what"]] / GB
    return [_row({**entry, "unit": "GB"}, entry["what"], value)]


def _checkpoint(entry: dict[str, Any], constants: Constants) -> list[Row]:
    work = Work(
        prompts=0,
        rollouts=1,
        demonstrations=1,
        prompt_tokens=1,
        response_tokens=1,
        demonstration_tokens=1,
        response_limit=1,
        longest=2,
    )
    case = Case(shape=_shape(entry["model"]), cluster=Cluster(gpu=GPUS["h100"]), work=work)
    return [_row({**entry, "unit": "GB"}, "checkpoint", checkpoint_bytes(case) / GB)]


_KINDS = {"train": _train, "grpo": _grpo, "memory": _memory, "checkpoint": _checkpoint}


def _row(entry: dict[str, Any], what: str, predicted: float) -> Row:
    return Row(
        name=entry["name"],
        what=what,
        published=entry["value"],
        predicted=predicted,
        unit=entry["unit"],
        source=entry["source"],
        use=entry["use"],
    )


def gpt_7b() -> ModelShape:
    """Megatron-LM's own regression run "gpt3 7b" [MLM-GOLD]: LayerNorm, GELU, learned positions, all logits at once."""
    config = {
        "model_type": "llama",
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    shape = FAMILIES["llama"](config)
    return dataclasses.replace(shape, transformer={**shape.transformer, "gated_linear_unit": False})


if __name__ == "__main__":
    sys.exit(main())
