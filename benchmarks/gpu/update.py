"""A whole CHORD update of a 7B- or 70B-shaped model with as many of its layers as fit, on random weights.

The rows have its time, MFU, time by kernel, memory and time compared with the planner's, and what offload moves.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import synchronize
from benchmarks.gpu.kernels import grouped, own_times
from benchmarks.gpu.rows import Rows, parser_of
from benchmarks.samples import fill_tokens
from benchmarks.shapes import SHAPES, model_config
from megatron_chord.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    sources_of,
)
from megatron_chord.costs.flops import head_flops, recomputed_flops, train_flops
from megatron_chord.data.packing import StepPlan, plan_step
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import FAMILIES
from megatron_chord.losses.aggregate import with_scales
from megatron_chord.methods.table import build as build_method
from megatron_chord.model import build, fp8, specs
from megatron_chord.plan.constants import CONSTANTS
from megatron_chord.plan.memory import Numerics, Training, stage_memory
from megatron_chord.plan.training import pass_seconds, speed
from megatron_chord.precision import PRESETS, preset
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.offload import Offload, storages
from megatron_chord.train.setup import packing_layout
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.throughput import own_gpu, throughput
from megatron_chord.train.update import Terms, Update, apply_gradients, compute_gradients, prepare_batches

MU = 0.2
FILL = 0.97
"""The share of the micro-batches' budget that the samples fill."""
ROOM, LOCAL_ROOM = 0.9, 0.75
"""The share of free memory that the planner's total may take when layers are chosen.

The total counts the activations of Transformer Engine's fused layers. Local layers keep more, unless they are
recomputed as a whole.
"""
OPTIMIZER_BYTES = 30
"""Bytes a parameter that AdamW reads and writes.

It reads gradient, weight and two moments in FP32. It writes the latter three, and the BF16 weight.
"""


def main() -> None:
    arguments = parse()
    rows = Rows(arguments.rows, arguments.part)
    fp8.set_environment(arguments.precision)
    if arguments.local:
        modules: tuple[Any, ...] = (build, specs)
        for module in modules:
            module.has_transformer_engine = lambda: False
    shape = choose_shape(arguments)
    run = make_run(arguments)
    groups = runtime.start(run.parallel, seed=0)
    state = build_state(
        shape,
        run.model,
        run.parallel,
        run.optim,
        groups=groups,
        steps=100,
        fp8=preset(arguments.precision).training,
        fill=fill_at_random,
    )
    terms = build_method(run.method).terms(run.resolved_objective(), run.batch)
    samples = fill_tokens(
        int(FILL * arguments.micro_batches * arguments.max_tokens),
        longest=arguments.max_tokens // 2,
        mean=arguments.mean,
        vocab=shape.vocab_size,
    )
    layout = packing_layout(shape, run.parallel, 1, preset(arguments.precision).training)
    plan = plan_step(with_scales(samples, terms), max_tokens=arguments.max_tokens, layout=layout, pad_id=0)
    lengths = [len(sample.token_ids) for sample in samples]
    seconds = measure_update(rows, arguments, state, plan, terms, lengths)
    compare_with_planner(rows, arguments, shape, len(plan.micro_batches[0]), lengths, seconds)
    trained = sum(len(part.positions) for sample in samples for part in sample.parts)
    work = group_flops(shape, arguments.recompute, lengths, trained)
    profile_update(rows, arguments.profile, lambda: update(state, plan, terms), seconds, work)
    measure_offload(rows, state)
    runtime.stop()


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="default: as many as the planner says will fit")
    parser.add_argument("--recompute", choices=["none", "mlp", "full"], default="none")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--mean", type=int, default=1500, help="of the responses' lengths")
    parser.add_argument("--precision", choices=[name for name in PRESETS if name != "fp8_rollout"])
    parser.add_argument(
        "--local", action="store_true", help="Megatron's local layers beside Transformer Engine, too"
    )
    parser.add_argument("--updates", type=int, default=3, help="after two to warm up")
    parser.add_argument("--profile", type=Path, help="file for the profiler's table")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.max_tokens, arguments.micro_batches, arguments.mean, arguments.updates = 256, 2, 60, 1
    return arguments


def choose_shape(arguments: argparse.Namespace) -> ModelShape:
    """Return the shape with ``--layers``, or with the most layers whose training fits the free memory by the
    planner."""
    config = model_config(arguments.shape, tiny=arguments.tiny)
    family = FAMILIES[config["model_type"]]
    if arguments.layers is not None or not torch.cuda.is_available():
        return family(config | {"num_hidden_layers": arguments.layers or config["num_hidden_layers"]})
    free, _ = torch.cuda.mem_get_info()
    keeps_more = arguments.recompute != "full" and not specs.has_transformer_engine()
    room = LOCAL_ROOM if keeps_more else ROOM
    for layers in range(config["num_hidden_layers"], 0, -1):
        shape = family(config | {"num_hidden_layers": layers})
        if planned_memory(arguments, shape, arguments.micro_batches) < room * free:
            return shape
    raise SystemExit(f"one layer of {arguments.shape} does not fit into {free / 1e9:.1f} GB")


def make_run(arguments: argparse.Namespace) -> RunConfig:
    """Return the settings of a run that reads no file."""
    nothing = Path("unused")
    return RunConfig(
        output=nothing,
        steps=100,
        model=ModelConfig(path=nothing, dtype="bf16", recompute=arguments.recompute),
        data=DataConfig(
            prompts=sources_of(nothing),
            demonstrations=sources_of(nothing),
            max_response_tokens=arguments.max_tokens,
        ),
        batch=BatchConfig(prompts=8, rollouts=7, demonstrations=8, max_tokens_per_gpu=arguments.max_tokens),
        objective=ObjectiveConfig(),
        optim=OptimConfig(lr=1e-6),
    )


def fill_at_random(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if "norm" in name:
            weight.data.fill_(1.0)
        elif "bias" in name:
            weight.data.zero_()
        else:
            weight.data.normal_(0.0, 0.02)


def update(state: TrainState, plan: StepPlan, terms: Terms) -> tuple[float, float, float]:
    """Train one update. Return the loss, the gradient norm and the seconds of the optimizer."""
    batches = prepare_batches(state, plan.micro_batches[0], terms, temperature=1.0)
    weights = {"policy": 1 - MU, "sft": MU}
    measured = compute_gradients(
        state, batches, Update(weights=weights, counts=plan.counts), terms, temperature=1.0
    )
    synchronize()
    start = time.perf_counter()
    norm, _ = apply_gradients(state)
    synchronize()
    return measured.result.loss, norm, time.perf_counter() - start


def measure_update(
    rows: Rows,
    arguments: argparse.Namespace,
    state: TrainState,
    plan: StepPlan,
    terms: Terms,
    lengths: list[int],
) -> float:
    for _ in range(2):
        update(state, plan, terms)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times, in_optimizer = [], []
    loss = norm = 0.0
    for _ in range(arguments.updates):
        synchronize()
        start = time.perf_counter()
        loss, norm, optimizer = update(state, plan, terms)
        times.append(time.perf_counter() - start)
        in_optimizer.append(optimizer)
    seconds, tokens = statistics.median(times), sum(lengths)
    squares = sum(length**2 for length in lengths)
    speeds = throughput(
        state.shape,
        tokens=tokens,
        squared_tokens=squares,
        passes=1.0,
        seconds=seconds,
        ranks=1,
        gpu=own_gpu(),
    )
    rows.measured(
        "update",
        seconds,
        amount=tokens * train_flops(state.shape, squares / tokens),
        ceiling="products",
        **speeds,
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        shape=arguments.shape,
        num_layers=state.shape.num_layers,
        layers="Transformer Engine" if specs.has_transformer_engine() else "local",
        precision=arguments.precision or "bf16",
        recompute=arguments.recompute,
        micro_batches=len(plan.micro_batches[0]),
        loss=loss,
        grad_norm=norm,
    )
    parameters = sum(parameter.numel() for parameter in state.parameters().values())
    rows.measured(
        "optimizer, clipping included",
        statistics.median(in_optimizer),
        amount=OPTIMIZER_BYTES * parameters,
        ceiling="copies",
        parameters=parameters,
    )
    return seconds


def planned_memory(arguments: argparse.Namespace, shape: ModelShape, micro_batches: int) -> float:
    """Return the bytes that torch allocates by the planner: its total without CUDA's own and without fragmentation."""
    training = Training(
        parallel=ParallelConfig(),
        data=1,
        micro_tokens=arguments.max_tokens,
        micro_batches=micro_batches,
        recompute=arguments.recompute,
        numerics=Numerics.of("bf16", fp8=preset(arguments.precision).training is not None),
    )
    constants = dataclasses.replace(CONSTANTS, cuda_bytes=0.0, fragmentation=0.0)
    return stage_memory(shape, training, 0, constants).total


def compare_with_planner(
    rows: Rows,
    arguments: argparse.Namespace,
    shape: ModelShape,
    micro_batches: int,
    lengths: list[int],
    seconds: float,
) -> None:
    case = "planner's memory"
    if torch.cuda.is_available():
        peak, planned = torch.cuda.max_memory_allocated(), planned_memory(arguments, shape, micro_batches)
        reserved = torch.cuda.max_memory_reserved()
        rows.found(
            case,
            planned_gb=planned / 1e9,
            measured_gb=peak / 1e9,
            error=planned / peak - 1,
            reserved_gb=reserved / 1e9,
        )
    else:
        rows.not_run(case, "needs a CUDA device, whose allocator counts")
    gpu = own_gpu()
    if gpu is None:
        rows.not_run("planner's time", "needs a kind of GPU that costs/gpus.py knows")
        return
    is_fp8 = preset(arguments.precision).training is not None
    expected = pass_seconds(
        shape,
        gpu,
        gpus=1,
        tokens=sum(lengths),
        length=sum(length**2 for length in lengths) / sum(lengths),
        efficiency=speed(shape, ParallelConfig(), gpu, micro_batches=micro_batches, fp8=is_fp8).efficiency,
    )
    rows.found("planner's time", planned_s=expected, measured_s=seconds, error=expected / seconds - 1)


def group_flops(shape: ModelShape, recompute: str, lengths: list[int], trained: int) -> dict[str, float]:
    """Return the FLOPs of two groups of kernels: all matrix products, and attention without its own recomputation.

    The head projects only trained tokens, and once more in the backward pass.
    """
    tokens = sum(lengths)
    mean = sum(length**2 for length in lengths) / tokens
    layers = train_flops(shape, 0.0) - head_flops(shape) + recomputed_flops(shape, 0.0, recompute)
    if recompute == "full":
        layers -= head_flops(shape) / 3  # a third of the whole model's; the head is not part of it
    attention = train_flops(shape, mean) - train_flops(shape, 0.0)
    return {
        "products": tokens * layers + trained * 4 / 3 * head_flops(shape),
        "attention": tokens * attention * (4 / 3 if recompute == "full" else 1),
    }


def profile_update(
    rows: Rows, path: Path | None, once: Callable[[], object], seconds: float, work: Mapping[str, float]
) -> None:
    """Add one row for each group of kernels. Write the profiler's own table to a file.

    Args:
        work: FLOPs of the groups that matrix products limit.
    """
    if path is None:
        return
    from torch.profiler import ProfilerActivity, profile

    has_cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * has_cuda]
    with profile(activities=kinds) as found:
        once()
    by = "self_cuda_time_total" if has_cuda else "self_cpu_time_total"
    table: Any = found.key_averages()
    path.write_text(table.table(sort_by=by, row_limit=60, max_name_column_width=90))
    groups = grouped(own_times(found))
    for group, taken in groups.items():
        rows.measured(
            f"kernels: {group}",
            taken,
            amount=work.get(group),
            ceiling="products" if group in work else None,
            of_kernels=taken / sum(groups.values()),
        )
    rows.found("kernels: all", busy_s=sum(groups.values()), of_update=sum(groups.values()) / seconds)


def measure_offload(rows: Rows, state: TrainState) -> None:
    """Measure the second move, when the host's memory exists. Bytes are those of the optimizer's state."""
    moved = sum(storage.nbytes() for storage in storages(state))
    offload, ways = Offload(state), {}
    for _ in range(2):
        for name, move in (("away", offload.to_host), ("back", offload.to_device)):
            synchronize()
            start = time.perf_counter()
            move()
            synchronize()
            ways[name] = time.perf_counter() - start
    rows.measured("offload: away", ways["away"], amount=moved, ceiling="to the host", gb=moved / 1e9)
    rows.measured("offload: back", ways["back"], amount=moved, ceiling="from the host", gb=moved / 1e9)


if __name__ == "__main__":
    main()
