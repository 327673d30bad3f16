"""What the tests of this folder run in each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_chord.config import ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.objective import StepWeights
from megatron_chord.model.forward import unwrapped
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.setup import layout_of
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.step import compute_gradients
from megatron_chord.weights.export import hf_tensors


def start_groups(parallel: ParallelConfig) -> runtime.ParallelGroups:
    """Groups for this layout; a second call in the same processes replaces the first's."""
    if torch.distributed.is_initialized():
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        return runtime.build_groups(parallel, device=device, seed=0)
    return runtime.start(parallel, seed=0)


def build(
    folder: Path, parallel: ParallelConfig, optim: OptimConfig | None = None, steps: int = 10
) -> TrainState:
    return build_state(
        read_shape(folder),
        ModelConfig(path=folder, dtype="fp32"),
        parallel,
        optim or OptimConfig(lr=1e-2),
        groups=start_groups(parallel),
        steps=steps,
    )


def gather_hf(state: TrainState, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors laid out like the parameters (weights or gradients), whole and by Hugging Face name, on every rank."""
    groups = state.groups
    mine = dict(
        hf_tensors(tensors, state.shape.weights, group=groups.tensor.group, vocab_size=state.shape.vocab_size)
    )
    merged: dict[str, torch.Tensor] = {}
    for part in groups.gather(mine if groups.holds_first_replica else {}):
        merged |= part
    return merged


def chord_steps(folder: Path, cases: list[dict[str, Any]]) -> list[tuple[dict[str, float], dict[str, Any]]]:
    """For each case: metrics and whole gradients of one step, without updating weights."""
    results = []
    for case in cases:
        parallel = ParallelConfig(distributed_optimizer=False, **case.get("parallel", {}))
        state = build(folder, parallel)
        plan = plan_step(
            case["samples"],
            max_tokens=case.get("max_tokens", 10_000),
            layout=layout_of(parallel, state.groups.data.size),
            pad_id=0,
        )
        result = compute_gradients(
            state,
            plan.micro_batches[state.groups.data.rank],
            StepWeights(
                mu=case["mu"],
                num_policy_tokens=plan.num_policy_tokens,
                num_expert_tokens=plan.num_expert_tokens,
            ),
            case.get("objective", ObjectiveConfig()),
            temperature=case.get("temperature", 1.0),
        )
        grads = {name: parameter.main_grad for name, parameter in state.parameters().items()}
        results.append(({"loss": result.loss, **result.means, **result.maxima}, gather_hf(state, grads)))
    return results


def packed_logits(folder: Path, cases: list[dict[str, Any]], sequences: list[list[int]]) -> list[list[Any]]:
    """For each layout: full-vocabulary logits [S, V] of every sequence from one packed forward pass."""
    import numpy as np

    from megatron_chord.data.packing import pack
    from megatron_chord.model.forward import to_device
    from megatron_chord.records import TrainSample

    results = []
    for case in cases:
        parallel = ParallelConfig(distributed_optimizer=False, **case)
        state = build(folder, parallel)
        samples = [
            TrainSample(kind="expert", token_ids=np.array(ids), trained=np.arange(len(ids)) > 0)
            for ids in sequences
        ]
        layout = layout_of(parallel, state.groups.data.size)
        batch = pack(samples, layout=layout, pad_id=0)
        results.append(_logits_of(state, batch, [len(ids) for ids in sequences], to_device))
    return results


def _logits_of(state: TrainState, batch: Any, lengths: list[int], to_device: Any) -> Any:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    groups = state.groups
    kept: list[torch.Tensor] = []

    def forward_step(iterator: Any, model: Any) -> Any:
        device_batch = next(iterator)
        output = model(
            device_batch.token_ids,
            device_batch.position_ids,
            None,
            packed_seq_params=device_batch.packed_seq_params,
        )

        def keep(hidden: torch.Tensor) -> Any:
            policy = unwrapped(model)
            if policy.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, group=groups.tensor.group)
            logits = hidden[:, 0] @ policy.output_weight().t()
            parts = [torch.empty_like(logits) for _ in range(groups.tensor.size)]
            torch.distributed.all_gather(parts, logits.contiguous(), group=groups.tensor.group)
            kept.append(torch.cat(parts, dim=1)[:, : state.shape.vocab_size])
            return hidden.sum(), {}

        return output, keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([to_device(batch, groups)]) for _ in state.chunks]
            if len(state.chunks) > 1
            else iter([to_device(batch, groups)]),
            model=list(state.chunks),
            num_microbatches=1,
            seq_length=len(batch.token_ids),
            micro_batch_size=1,
            forward_only=True,
        )
    if not kept:
        return None
    starts = batch.cu_seqlens.tolist()
    return [kept[0][start : start + n].numpy() for start, n in zip(starts, lengths, strict=False)]
