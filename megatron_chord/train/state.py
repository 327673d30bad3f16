"""The training state of this rank: model chunks, optimizer and schedule, built and loaded from a folder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from megatron_chord.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.model.build import build_chunks, global_parameters, global_weights, transformer_config
from megatron_chord.model.forward import unwrapped
from megatron_chord.model.fp8 import optimizer_settings
from megatron_chord.model.replay import install_replay, routed_layers
from megatron_chord.precision import Fp8Training
from megatron_chord.runtime import megatron
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.train.averaged import AveragedWeights
from megatron_chord.train.second_adam import SecondAdam
from megatron_chord.weights.export import expected_sums, hf_tensors
from megatron_chord.weights.folder import open_model
from megatron_chord.weights.load import load


class NonFiniteGradient(RuntimeError):
    """A gradient is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that an optimizer step changes or needs."""

    shape: ModelShape
    groups: ParallelGroups
    chunks: tuple[Any, ...]
    """Model chunks of this pipeline stage in Megatron's DistributedDataParallel."""
    optimizer: Any
    scheduler: Any
    reference: tuple[Any, ...] = ()
    """Model chunks of the reference policy, which is never updated; empty unless the objective needs it."""
    second: SecondAdam | None = None
    """The optimizer state of the method's extra updates."""
    averaged: AveragedWeights | None = None
    """The average of the policy's weights, with which a teacher computes."""

    def parameters(self) -> dict[str, Tensor]:
        return global_parameters([unwrapped(chunk) for chunk in self.chunks])

    def weights(self) -> dict[str, Tensor]:
        """The parameters, and the buffers that belong to the model but are not trained."""
        return global_weights([unwrapped(chunk) for chunk in self.chunks])

    def routed_layers(self) -> list[int]:
        """Numbers of this stage's layers whose routers can replay the rollout engine's routes."""
        return routed_layers([unwrapped(chunk) for chunk in self.chunks])

    def hf_tensors(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the full Hugging Face tensors. Exporters yield tensors; other ranks yield nothing.

        Every rank must iterate to the end, because all take part in the gathers. ``tensors``: if given, they replace
        the parameters; they must have the same layout.
        """
        return hf_tensors(
            self.weights() if tensors is None else tensors, self.shape.weights, **self._exported()
        )

    def expected_sums(self) -> dict[str, int]:
        """The sums of the tensors that ``hf_tensors`` yields on this rank (``weights.sums``), from the parameters.

        Every rank must call it. Collectives: two small gathers over the tensor and the expert axis.
        """
        return expected_sums(self.weights(), self.shape.weights, **self._exported())

    def _exported(self) -> dict[str, Any]:
        """The data about this rank that an export needs."""
        groups = self.groups
        return {
            "tensor_group": groups.tensor.group if groups.holds_first_replica else None,
            "expert_group": groups.expert.group if groups.holds_first_experts else None,
            "vocab_size": self.shape.vocab_size,
        }


def build_state(  # noqa: PLR0913 (the last is for benchmarks)
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    *,
    groups: ParallelGroups,
    steps: int,
    reference: Path | None = None,
    fp8: Fp8Training | None = None,
    fill: Callable[[Mapping[str, Tensor]], object] | None = None,
) -> TrainState:
    """Build this rank's part of the model, load it from ``model.path`` and make its optimizer.

    Args:
        reference: folder of the reference policy, which has the same shape; used only for its log-probs.
        fp8: FP8 settings of the matrix products of both policies.
        fill: sets the weights in place, by their names in Megatron. If given, ``model.path`` is not read.

    Collectives: those of Megatron's constructors. All ranks must call it.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    config, chunks = _filled(shape, model, parallel, groups, fp8, fill)
    install_replay(chunks)  # not on the reference policy, which routes all tokens itself
    reference_chunks: tuple[Any, ...] = ()
    if reference is not None:
        _, read = _filled(shape, replace(model, path=reference), parallel, groups, fp8)
        reference_chunks = tuple(chunk.requires_grad_(False) for chunk in read)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        # Megatron's check would wait for the device twice for every bucket; _checked_norm replaces it.
        check_for_nan_in_grad=False,
    )
    wrapped = tuple(
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    )
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        # The schedules call it around all micro-batches except the last, whose backward pass reduces the gradients.
        pauses = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    optimizer = _optimizer(model, parallel, optim, wrapped, fp8)
    return TrainState(
        shape=shape,
        groups=groups,
        chunks=wrapped,
        optimizer=optimizer,
        scheduler=_scheduler(optimizer, optim, steps),
        reference=reference_chunks,
    )


def parts_of(optimizer: Any) -> list[Any]:
    """Megatron's optimizers of single kinds of parameters, such as experts', that ``optimizer`` chains; else itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def with_second_adam(state: TrainState, lr: float | None) -> TrainState:
    """``state`` with a second optimizer state, whose updates have the learning rate ``lr``; None: without one."""
    return state if lr is None else replace(state, second=SecondAdam(parts_of(state.optimizer), lr=lr))


def with_averaged(state: TrainState, rate: float | None) -> TrainState:
    """``state`` with an average of its weights (``train.averaged``); None: without one."""
    if rate is None:
        return state
    return replace(state, averaged=AveragedWeights(parts_of(state.optimizer), state.chunks, rate=rate))


def reset_optimizer(state: TrainState) -> None:
    """Reset Adam's moments and the learning-rate schedule to the state at the beginning of a run."""
    for optimizer in parts_of(state.optimizer):
        inner = optimizer.optimizer
        for moments in inner.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments:
                    moments[name].zero_()
        for group in inner.param_groups:
            group["step"] = 0
    restart_schedule(state, state.scheduler.num_steps)


def learning_rate_at(optim: OptimConfig, *, steps: int, step: int, since: int = 0) -> float:
    """The learning rate that training step ``step`` of a run of ``steps`` uses; the first is 0.

    ``since``: the step at which the schedule was restarted last.
    """
    scheduler = _scheduler(SimpleNamespace(param_groups=[]), optim, steps)
    scheduler.lr_decay_steps -= since
    scheduler.num_steps = step + 1 - since
    return float(scheduler.get_lr({}))


def restart_schedule(state: TrainState, since: int) -> None:
    """Restart the learning-rate schedule at step ``since``. It ends at the same step as before."""
    state.scheduler.num_steps -= since
    state.scheduler.lr_decay_steps -= since
    state.scheduler.step(0)


def _filled(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    fp8: Fp8Training | None,
    fill: Callable[[Mapping[str, Tensor]], object] | None = None,
) -> tuple[Any, list[Any]]:
    """Megatron's config, and this rank's model chunks with the weights of ``model.path`` or of ``fill``."""
    config = transformer_config(shape, model, parallel, fp8)
    chunks = build_chunks(config, shape)
    if fill is not None:
        fill(global_weights(chunks))
        return config, chunks
    read = functools.partial(
        load,
        global_weights(chunks),
        shape.weights,
        open_model(model.path, shape.weights),
        vocab_size=shape.vocab_size,
        tensor_rank=groups.tensor.rank,
        tensor_size=groups.tensor.size,
    )
    groups.together(read)
    return config, chunks


def _optimizer(
    model: ModelConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    chunks: tuple[Any, ...],
    fp8: Fp8Training | None,
) -> Any:
    """The Adam that Megatron chooses: Transformer Engine's, else Apex's, else torch's (``runtime.adam`` without
    CUDA)."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_chord.model.build import DTYPES

    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=model.dtype == "bf16",
        params_dtype=DTYPES[model.dtype],
        use_distributed_optimizer=parallel.distributed_optimizer,
        **optimizer_settings(fp8),
    )
    optimizer: Any = get_megatron_optimizer(config, list(chunks))
    optimizer.get_grad_norm = functools.partial(_checked_norm, optimizer.get_grad_norm)
    _gather_once(optimizer)
    megatron.keep_one_norm(optimizer)
    return optimizer


def _gather_once(optimizer: Any) -> None:
    """Gather new weights only after the last of the chained optimizers (the optimizer of the experts is the last).

    Megatron-Core would gather all weights after each of them (distrib_optimizer.py; 0.16.1: 2618, 0.19.2: 3185).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in optimizer.chained_optimizers[:-1]:
        if isinstance(part, DistributedOptimizer):
            part.step_with_ready_grads = super(DistributedOptimizer, part).step_with_ready_grads


def _checked_norm(get_grad_norm: Callable[[], float]) -> float:
    """Megatron's gradient norm, checked. Megatron's step computes it before it changes a weight; equal on every rank.

    It is read from the device only here: with Transformer Engine, Megatron-Core 0.19.2 returns a tensor.
    """
    norm = float(get_grad_norm())
    if not math.isfinite(norm):
        raise NonFiniteGradient(f"the gradient norm is {norm}; no weight has been changed by it")
    return norm


def _scheduler(optimizer: Any, optim: OptimConfig, steps: int) -> Any:
    """Megatron's schedule. It also applies each group's wd_mult, which excludes norms and biases from weight decay."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        # The schedule advances before each update; one more step keeps the last update's rate above min_lr.
        lr_decay_steps=max(optim.horizon(steps), optim.warmup_steps) + 1,
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
