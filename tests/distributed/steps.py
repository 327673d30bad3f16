"""Functions that the tests of this folder run in each rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig
from megatron_chord.data.packing import plan_step
from megatron_chord.families.table import read_shape
from megatron_chord.losses.aggregate import drop_zero_gradient_parts, with_scales
from megatron_chord.model.forward import unwrapped
from megatron_chord.runtime import parallel as runtime
from megatron_chord.train.export import export_policy
from megatron_chord.train.setup import can_share_prompts, packing_layout
from megatron_chord.train.state import TrainState, build_state
from megatron_chord.train.update import Update, compute_gradients, prepare_batches
from megatron_chord.weights.load import load
from megatron_chord.weights.reader import HFReader
from tests.support.tiny import terms_of


def start_groups(parallel: ParallelConfig) -> runtime.ParallelGroups:
    """Build the groups of this layout. A second call in the same process replaces the groups of the first."""
    if torch.distributed.is_initialized():
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        return runtime.build_groups(parallel, device=device, seed=0)
    return runtime.start(parallel, seed=0)


def build(
    folder: Path,
    parallel: ParallelConfig,
    optim: OptimConfig | None = None,
    steps: int = 10,
    reference: Path | None = None,
    groups: runtime.ParallelGroups | None = None,
    recompute: Literal["none", "mlp", "full"] = "none",
) -> TrainState:
    """Build a training state in FP32. ``groups`` may come from an earlier call with the same layout."""
    return build_state(
        read_shape(folder),
        ModelConfig(path=folder, dtype="fp32", recompute=recompute),
        parallel,
        optim or OptimConfig(lr=1e-2),
        groups=groups or start_groups(parallel),
        steps=steps,
        reference=reference,
    )


def fill(state: TrainState, folder: Path) -> None:
    """Replace the state's weights by those of another folder."""
    load(
        state.weights(),
        state.shape.weights,
        HFReader.of(folder),
        vocab_size=state.shape.vocab_size,
        tensor_rank=state.groups.tensor.rank,
        tensor_size=state.groups.tensor.size,
    )


def gather_hf(state: TrainState, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole tensors by Hugging Face name, on every rank. ``tensors`` are laid out like the parameters: weights
    or gradients."""
    mine = dict(state.hf_tensors(tensors))
    merged: dict[str, torch.Tensor] = {}
    for part in state.groups.gather(mine):
        merged |= part
    return merged


def updates(
    folder: Path, cases: list[dict[str, Any]]
) -> list[tuple[dict[str, float], dict[str, Any] | None]]:
    """Return, for each case, the metrics and the whole gradients of one update of the case's ``run``.

    Only rank 0 returns gradients, because whole gradients are equal on all ranks, and a case has 16 MB of them.

    A case with ``old`` stands for a later update of a step: what the trainer computes before the update is then
    computed with the weights of that folder. A case with ``noise`` measures that, too. One with ``drops`` leaves out
    what has no gradient, as the coordinator does.
    """
    results = []
    built: tuple[Any, TrainState] | None = None
    for case in cases:
        run: RunConfig = case["run"]
        parallel = replace(run.parallel, distributed_optimizer=False)
        terms = terms_of(run)
        made_of = (parallel, case.get("reference"), run.model.recompute)
        if built is None or built[0] != made_of:
            # The state is reused between cases: gloo keeps the threads of every group that was ever built.
            state = build(folder, parallel, reference=case.get("reference"), recompute=run.model.recompute)
            built = (made_of, state)
        state = built[1]
        old: Path | None = case.get("old")
        if old is not None:
            fill(state, old)
        samples = with_scales(case["samples"], terms)
        plan = plan_step(
            drop_zero_gradient_parts(samples, terms, min_tokens=0) if case.get("drops") else samples,
            max_tokens=run.batch.max_tokens_per_gpu,
            layout=packing_layout(
                state.shape,
                parallel,
                state.groups.data.size,
                shares_prompts=run.batch.share_prompts and can_share_prompts(state.shape, parallel),
            ),
            pad_id=0,
        )
        temperature = run.rollout.temperature
        batches = prepare_batches(
            state, plan.micro_batches[state.groups.data.rank], terms, temperature=temperature
        )
        if old is not None:
            fill(state, folder)
        update = Update(weights=case["weights"], counts=plan.counts, noise=case.get("noise"))
        result = compute_gradients(state, batches, update, terms, temperature=temperature).result
        grads = {name: parameter.main_grad for name, parameter in state.parameters().items()}
        parts = state.groups.to_coordinator(dict(state.hf_tensors(grads)))
        whole = {name: tensor for part in parts for name, tensor in part.items()}
        results.append(({"loss": result.loss, **result.means, **result.maxima}, whole or None))
    return results


def packed_logits(folder: Path, cases: list[dict[str, Any]], sequences: list[list[int]]) -> list[list[Any]]:
    """Return, for each layout, the full-vocabulary logits [S, V] of every sequence, from one packed forward pass."""
    return [
        logits_of(build(folder, ParallelConfig(distributed_optimizer=False, **case)), sequences)
        for case in cases
    ]


def logits_and_exports(
    layouts: dict[str, dict[str, Any]], folders: list[Path], target: Path, sequences: list[list[int]]
) -> dict[str, list[Any]]:
    """Return, for each layout, the packed logits of every model. Also export each model to ``target/<layout>/<folder
    name>``."""
    results: dict[str, list[Any]] = {}
    for name, layout in layouts.items():
        parallel = ParallelConfig(distributed_optimizer=False, **layout)
        groups = start_groups(parallel)
        results[name] = []
        for folder in folders:
            state = build(folder, parallel, groups=groups)
            results[name].append(logits_of(state, sequences))
            export_policy(state, folder, target / name / folder.name)
    return results


def logits_of(state: TrainState, sequences: list[list[int]]) -> Any:
    """Return the logits of each sequence from one packed forward pass. Only the last pipeline stage has them; others
    get None."""
    import numpy as np

    from megatron_chord.data.packing import pack
    from megatron_chord.model.forward import to_device
    from megatron_chord.records import TrainSample

    samples = [TrainSample(token_ids=np.array(ids), parts=()) for ids in sequences]
    config = unwrapped(state.chunks[0]).config
    parallel = ParallelConfig(
        tensor=state.groups.tensor.size,
        context=state.groups.context.size,
        sequence_parallel=config.sequence_parallel,
    )
    batch = pack(
        samples, columns={}, layout=packing_layout(state.shape, parallel, state.groups.data.size), pad_id=0
    )
    return _logits_of(state, batch, [len(ids) for ids in sequences], to_device)


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

    count = groups.pipeline.size if len(state.chunks) > 1 else 1  # minimum of the interleaved schedule
    iterators = [iter([to_device(batch, groups)] * count) for _ in state.chunks]
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(state.chunks),
            num_microbatches=count,
            seq_length=len(batch.token_ids),
            micro_batch_size=1,
            forward_only=True,
        )
    if not kept:
        return None
    starts = batch.cu_seqlens.tolist()
    return [kept[0][start : start + n].numpy() for start, n in zip(starts, lengths, strict=False)]
