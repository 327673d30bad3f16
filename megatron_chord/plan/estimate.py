"""Estimates whether one layout of a run fits a cluster, and how long a step takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_chord.config import ParallelConfig, RunConfig, check_lengths, data_parallel_size
from megatron_chord.costs import parameters
from megatron_chord.costs.balance import slowdown
from megatron_chord.costs.flops import recomputed_flops, train_flops
from megatron_chord.costs.gpus import Gpu
from megatron_chord.costs.parameters import WEIGHT_BYTES, largest_tensor, model_count
from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape
from megatron_chord.losses.terms import need_reference, num_forward_passes
from megatron_chord.methods.base import Method
from megatron_chord.methods.table import method_of
from megatron_chord.model.build import check_shape
from megatron_chord.model.fp8 import check_fp8
from megatron_chord.plan.constants import CONSTANTS, GB, Constants
from megatron_chord.plan.decoding import Server, sampling_seconds
from megatron_chord.plan.memory import (
    Numerics,
    ServerMemory,
    StageMemory,
    Training,
    gb,
    server_memory,
    stage_memory,
)
from megatron_chord.plan.push import job_transport, push_seconds
from megatron_chord.plan.training import Speed, micro_batches, pass_seconds, reduction_seconds, speed
from megatron_chord.plan.work import EarlyStop, Work
from megatron_chord.precision import Precision, preset
from megatron_chord.rollout.sync import BUCKET_BYTES, TransportName
from megatron_chord.train.setup import packing_layout

_MOMENTS_BYTES = 8
"""Bytes for each parameter of Adam's two moments of extra updates."""
_AVERAGE_BYTES = 4
"""Bytes for each parameter of averaged weights."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs of a run."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8
    rollout_nodes: int = 0
    """Number of nodes that only sample. 0: trainer and servers share all nodes."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 1:
            raise ValueError(f"{self.nodes} nodes of {self.gpus_per_node} GPUs: both must be at least 1")
        if not 0 <= self.rollout_nodes < self.nodes:
            raise ValueError(
                f"{self.rollout_nodes} of {self.nodes} nodes for rollouts leave none to train on"
            )

    @property
    def colocated(self) -> bool:
        return self.rollout_nodes == 0

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def train_gpus(self) -> int:
        return (self.nodes - self.rollout_nodes) * self.gpus_per_node

    @property
    def rollout_gpus(self) -> int:
        return (self.rollout_nodes or self.nodes) * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run on a cluster, before a layout of the trainer is chosen."""

    shape: ModelShape
    cluster: Cluster
    work: Work
    numerics: Numerics = field(default_factory=Numerics)
    weight_bytes: float = 2
    """Bytes per parameter on disk and in a weight push."""
    reference: bool = False
    precision: Precision | None = None
    rollout_tensor: int = 1
    utilization: float = 0.6
    """Share of each GPU's memory for vLLM."""
    cache_bytes: float | None = None
    overlap: bool = False
    """True if the next step is sampled while this step trains."""
    offload: bool = False
    """True if optimizer state, gradients and reference are moved off the GPU while servers sample on it."""
    stated_offload: bool | None = None
    """``rollout.offload``; None if it is not set. For the search, which tries other splits of the nodes."""
    transport: TransportName | Literal["auto"] = "auto"
    """``rollout.transport``"""
    push_limit_s: float | None = None
    """``timeouts.weight_push_s``"""
    kept_checkpoints: int = 2
    """``checkpoint.keep``, and one more with ``checkpoint.keep_best``"""
    optimizer_states: int = 1
    """Number of optimizer states in a checkpoint: one more with updates that have a state of their own (ReLIFT), and
    one more with averaged weights (``method.teacher: averaged``)."""
    host_state_bytes: float = 0.0
    """Bytes for each parameter of these further states in main memory, where they are kept."""
    stages_checkpoints: bool = False
    """True if training continues while a checkpoint is written from a copy in main memory."""
    replays_routes: bool = True
    """True if a mixture of experts replays the servers' routes (``rollout.router_replay``)."""
    constants: Constants = CONSTANTS

    def __post_init__(self) -> None:
        tensor, cluster = self.rollout_tensor, self.cluster
        if cluster.rollout_gpus % tensor:
            raise ValueError(
                f"rollout.tensor {tensor} does not divide the {cluster.rollout_gpus} GPUs that sample"
            )
        if self.shape.num_heads % tensor:
            raise ValueError(
                f"rollout.tensor {tensor} does not divide the model's {self.shape.num_heads} attention heads"
            )
        if self.overlap and cluster.colocated:
            raise ValueError("sampling can run beside training only on nodes of its own")

    @property
    def servers(self) -> int:
        return self.cluster.rollout_gpus // self.rollout_tensor

    @property
    def server_weight_bytes(self) -> float:
        return 1.0 if preset(self.precision).rollouts else self.weight_bytes

    def server(self) -> ServerMemory:
        return server_memory(
            self.shape,
            self.cluster.gpu,
            tensor=self.rollout_tensor,
            utilization=self.utilization,
            weight_bytes=self.server_weight_bytes,
            kv_dtype_bytes=self.weight_bytes,
            cache_bytes=self.cache_bytes,
            constants=self.constants,
        )

    def sampling_seconds(self) -> float:
        if self.work.sequences == 0:
            return 0.0
        server = Server(
            gpu=self.cluster.gpu,
            tensor=self.rollout_tensor,
            kv_tokens=self.server().tokens,
            weight_bytes=self.server_weight_bytes,
            kv_dtype_bytes=self.weight_bytes,
            flops_factor=2.0 if preset(self.precision).rollouts else 1.0,
            spans_nodes=self.rollout_tensor > self.cluster.gpus_per_node,
        )
        return sampling_seconds(self.shape, server, self.work, servers=self.servers, constants=self.constants)

    def sync_seconds(self) -> float:
        if self.work.sequences == 0:
            return 0.0
        return push_seconds(
            self.chosen_transport,
            self.weight_bytes * model_count(self.shape),
            gpus_per_node=self.cluster.gpus_per_node,
            constants=self.constants,
        )

    @property
    def chosen_transport(self) -> TransportName:
        if self.transport != "auto":
            return self.transport
        return job_transport(nodes=self.cluster.nodes, colocated=self.cluster.colocated)

    @property
    def uses_ipc(self) -> bool:
        """Whether servers read weights from trainers' GPUs by CUDA IPC."""
        return self.work.sequences > 0 and self.chosen_transport in ("ipc", "relay")

    @property
    def peer_contexts(self) -> float:
        """Reserve in bytes on a trainer's GPU from which servers on other GPUs of the node read weights."""
        has_peers = self.uses_ipc and self.cluster.gpus_per_node > 1
        return self.constants.peer_context_bytes if has_peers else 0.0

    @property
    def push_buffers(self) -> float:
        """Bytes of the two buffers that a rank keeps on its GPU from its first push on, if it hands weights to servers
        by CUDA IPC (``rollout.transports.IpcTransport``): a pipeline stage's exporter, or a node's publisher. A bucket
        has ``BUCKET_BYTES``, or one larger tensor."""
        if not self.uses_ipc:
            return 0.0
        largest = self.weight_bytes * largest_tensor(self.shape)
        return 2 * max(BUCKET_BYTES[self.chosen_transport], largest)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The trainer's settings that the search chooses."""

    parallel: ParallelConfig
    max_tokens: int
    recompute: str


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step."""

    sampling: float
    scoring: float
    training: float
    sync: float
    overlap: bool
    overhead: float
    """Everything else: a share of the sum of the phases."""
    offload: float = 0.0
    """Time to move optimizer state and reference to main memory and back."""
    reduction: float = 0.0
    """Time to sum gradients over data-parallel ranks, and to gather weights from them, in all updates of the step."""

    @property
    def trainer(self) -> float:
        return self.scoring + self.training + self.reduction

    @property
    def step(self) -> float:
        phases = max(self.sampling, self.trainer) if self.overlap else self.sampling + self.trainer
        return (phases + self.sync + self.offload) * (1 + self.overhead)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Main memory of the fullest node, in bytes."""

    offloaded: float
    """Pinned: what the ranks move off the GPUs while servers sample (``train/offload.py``)."""
    staged: float
    """While a checkpoint is written: a copy of the node's part of it if training goes on, and of further optimizer
    states in any case."""
    processes: float
    """Memory of the processes of ranks and servers."""
    states: float
    """The moments of extra updates, and averaged weights (``train/second_adam.py``, ``train/averaged.py``)."""
    routes: float
    """For mixtures of experts, one step's routes: those that the node's servers keep, and those that its ranks read."""

    @property
    def total(self) -> float:
        return self.offloaded + self.staged + self.states + self.routes + self.processes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    choice: Choice
    training: Training
    stages: tuple[StageMemory, ...]
    """The pipeline stages among which is the one with the most memory (``_stages_to_see``)."""
    server: ServerMemory | None
    training_peak: float
    """Bytes on the fullest GPU while training."""
    sampling_peak: float
    """Bytes on the fullest GPU while sampling, if trainer and servers share GPUs; otherwise on a server's GPU."""
    saved: float
    """Bytes that the fullest GPU moves to main memory while servers sample."""
    host: HostMemory
    problems: tuple[str, ...]
    """Messages about what does not fit, and by how much; empty if everything fits."""
    warnings: tuple[str, ...]
    """Messages about what fits but will fail or take long."""
    times: Times
    speed: Speed
    mfu: float
    """MFU of the training passes: model FLOP/s divided by the peak, without recomputation."""
    tokens_per_s: float
    """All tokens of a step divided by its time."""

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)


def case_of(
    run: RunConfig,
    cluster: Cluster,
    *,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
    demonstration_tokens: float | None = None,
    overlap: bool = False,
    constants: Constants = CONSTANTS,
) -> Case:
    """The case that the settings describe. Lengths that are not given are assumed.

    Args:
        prompt_tokens: mean. None: a quarter of ``data.max_prompt_tokens``.
        response_tokens: likewise, of ``data.max_response_tokens``.
        demonstration_tokens: likewise. None: as long as the responses.

    Raises:
        ValueError: settings or model cannot be used, or lengths exceed the settings' limits.
    """
    method, shape = method_of(run), read_shape(run.model.path)
    check_lengths(run.data, shape.max_positions)
    method.check_positions(run.data, shape.max_positions)
    fp8 = preset(run.precision)
    response = _mean("response", response_tokens, run.data.max_response_tokens)
    terms = method.terms(run.resolved_objective(), run.batch).values()
    samples = method.uses_rollouts(run.batch)
    return Case(
        shape=shape,
        cluster=cluster,
        work=Work(
            prompts=run.batch.prompts if samples else 0,
            rollouts=run.batch.rollouts,
            demonstrations=_demonstrations(run, method),
            prompt_tokens=_mean("prompt", prompt_tokens, run.data.max_prompt_tokens),
            response_tokens=response,
            demonstration_tokens=_mean(
                "demonstration", demonstration_tokens or response, run.data.max_response_tokens
            ),
            response_limit=run.data.max_response_tokens,
            longest=run.data.max_prompt_tokens + run.data.max_response_tokens,
            updates=run.batch.updates_per_step,
            epochs=run.batch.epochs,
            passes=num_forward_passes(terms),
            early_stop=_early_stop(run) if samples else None,
        ),
        numerics=Numerics.of(run.model.dtype, fp8=fp8.training is not None),
        weight_bytes=WEIGHT_BYTES[run.model.dtype],
        reference=need_reference(terms),
        precision=run.precision,
        rollout_tensor=run.rollout.tensor,
        utilization=run.rollout.gpu_memory_utilization,
        cache_bytes=run.rollout.kv_cache_bytes,
        overlap=overlap,
        offload=_offloads(run, cluster) and samples,
        stated_offload=run.rollout.offload,
        transport=run.rollout.transport,
        push_limit_s=run.timeouts.weight_push_s,
        kept_checkpoints=run.checkpoint.keep + (run.checkpoint.keep_best is not None),
        optimizer_states=method.num_optimizer_states(),
        host_state_bytes=_MOMENTS_BYTES * (method.extra_rate() is not None)
        + _AVERAGE_BYTES * (method.averaging_rate() is not None),
        stages_checkpoints=run.checkpoint.asynchronous is not False,
        replays_routes=run.rollout.router_replay is not False,
        constants=constants,
    )


def _early_stop(run: RunConfig) -> EarlyStop | None:
    rollout = run.rollout
    if rollout.partial is None:
        return None
    return EarlyStop(
        extra_prompts=rollout.extra_of(run.batch.prompts),
        carries=rollout.carries,
        max_carries=rollout.max_carries,
    )


def _offloads(run: RunConfig, cluster: Cluster) -> bool:
    """The setting, or if it is not set, the value that ``train/engine.py`` chooses."""
    stated = run.rollout.offload
    return cluster.colocated and run.rollout.asynchronous is None if stated is None else stated


def choice_of(run: RunConfig) -> Choice:
    return Choice(
        parallel=run.parallel, max_tokens=run.batch.max_tokens_per_gpu, recompute=run.model.recompute
    )


def estimate(case: Case, choice: Choice, *, sampling: float | None = None) -> Estimate:
    """Memory and time of this layout.

    Args:
        sampling: ``case.sampling_seconds()`` where it is already known: it does not depend on the choice.

    Raises:
        ValueError: the layout is not possible on these GPUs, with the reason that the trainer would give.
    """
    parallel, cluster, work = choice.parallel, case.cluster, case.work
    check_shape(case.shape, parallel)
    check_fp8(case.shape, parallel, case.precision)
    data = data_parallel_size(parallel, cluster.train_gpus)
    packing = packing_layout(case.shape, parallel, data, preset(case.precision).training)
    count = micro_batches(
        work.tokens / work.updates,
        data=data,
        budget=choice.max_tokens,
        multiple=packing.count_multiple,
    )
    largest = max(choice.max_tokens, work.longest)
    training = Training(
        parallel=parallel,
        data=data,
        micro_tokens=-(-largest // packing.batch_multiple) * packing.batch_multiple,
        micro_batches=count,
        recompute=choice.recompute,
        numerics=case.numerics,
        reference=case.reference,
    )
    stages = tuple(
        stage_memory(case.shape, training, stage, case.constants)
        for stage in _stages_to_see(case.shape, parallel)
    )
    server = case.server() if work.sequences else None
    pushing = case.peer_contexts + case.push_buffers
    asleep = case.constants.asleep_bytes + pushing if server and cluster.colocated else 0.0
    beside = (
        max(_beside(case, stage) for stage in stages) + case.constants.cuda_bytes + pushing
        if cluster.colocated
        else 0.0
    )
    training_peak = max(stage.total for stage in stages) + asleep
    sampling_peak = beside + server.reserved if server else 0.0
    how = speed(
        case.shape,
        parallel,
        cluster.gpu,
        micro_batches=count,
        slowdown=slowdown(
            case.shape,
            parallel,
            length=work.length,
            recompute=choice.recompute,
            head_passes=case.constants.head_passes,
        ),
        fp8=preset(case.precision).training is not None,
        long_packs=work.sequences == 0,
        constants=case.constants,
    )
    saved = max(stage.saved for stage in stages) if case.offload else 0.0
    recomputing = 1 + (
        recomputed_flops(case.shape, work.length, choice.recompute) / train_flops(case.shape, work.length)
    )
    reduction = reduction_seconds(
        case.shape,
        parallel,
        cluster.gpu,
        gpus=cluster.train_gpus,
        parameter_bytes=case.numerics.gradients + case.numerics.weights,
        gpus_per_node=cluster.gpus_per_node,
        constants=case.constants,
    )
    times = _times(case, how, sampling, saved, recomputing, reduction)
    return Estimate(
        choice=choice,
        training=training,
        stages=stages,
        server=server,
        training_peak=training_peak,
        sampling_peak=sampling_peak,
        saved=saved,
        host=host_memory(case, choice, stages, saved),
        warnings=tuple(_warnings(case)),
        problems=tuple(_problems(case, stages, server, training_peak, sampling_peak)),
        times=times,
        speed=how,
        mfu=how.efficiency / recomputing,
        tokens_per_s=work.tokens / times.step,
    )


def checkpoint_bytes(case: Case) -> float:
    """Bytes of one training checkpoint."""
    return parameters.checkpoint_bytes(
        model_count(case.shape), case.weight_bytes, optimizers=case.optimizer_states
    )


def disk_bytes(case: Case) -> float:
    """Bytes of the checkpoints that a run keeps, and of one more, which is written before the oldest is deleted."""
    return (case.kept_checkpoints + 1) * checkpoint_bytes(case)


def host_memory(case: Case, choice: Choice, stages: Sequence[StageMemory], saved: float) -> HostMemory:
    """Main memory of a node that trains; all its GPUs count as those of the fullest stage.

    Args:
        saved: bytes that one GPU offloads.
    """
    gpus = case.cluster.gpus_per_node
    processes = gpus * (2 if case.work.sequences and case.cluster.colocated else 1)
    # A checkpoint has the weights and, also where training is in FP32, main weights and moments. Each rank writes the
    # part of which it keeps the optimizer state. Further optimizer states are copied also where training waits
    # (train/checkpoint.py, _other_described).
    one = parameters.checkpoint_bytes(1, case.weight_bytes, optimizers=case.optimizer_states)
    further = one - parameters.checkpoint_bytes(1, case.weight_bytes)
    kept = max(stage.optimizer for stage in stages) / case.numerics.optimizer
    return HostMemory(
        offloaded=gpus * saved,
        staged=gpus * kept * (one if case.stages_checkpoints else further),
        states=gpus * kept * case.host_state_bytes,
        processes=processes * case.constants.host_process_bytes,
        routes=_routes_bytes(case, choice),
    )


def _routes_bytes(case: Case, choice: Choice) -> float:
    """Bytes of routes on a node that trains: what its servers keep, and what each of its ranks reads."""
    cluster, parallel = case.cluster, choice.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    kept = 1 / cluster.nodes if cluster.colocated else 0.0
    return step_routes_bytes(case) * (kept + cluster.gpus_per_node * replica / cluster.train_gpus)


def step_routes_bytes(case: Case) -> float:
    """Bytes of the routes of a step's rollouts; 0 without router replay."""
    routes, work = case.shape.routes, case.work
    if routes is None or not case.replays_routes:
        return 0.0
    width = 1 if routes.experts <= 256 else 2
    tokens = work.sequences * (work.prompt_tokens + work.response_tokens)
    return tokens * routes.layers * routes.chosen * width


def export_bytes(case: Case) -> float:
    """Bytes of the exported Hugging Face folder."""
    return case.weight_bytes * model_count(case.shape)


def _beside(case: Case, stage: StageMemory) -> float:
    """Bytes of the trainer on a GPU while servers sample on it."""
    return stage.beside_servers if case.offload else stage.static


def _times(
    case: Case, how: Speed, sampling: float | None, saved: float, recomputing: float, reduction: float
) -> Times:
    """The times of a step.

    Args:
        recomputing: FLOPs of training divided by those without recomputation.
        reduction: seconds of one update's gradients and weights between data-parallel ranks.
    """
    work = case.work
    one = pass_seconds(
        case.shape,
        case.cluster.gpu,
        gpus=case.cluster.train_gpus,
        tokens=work.tokens,
        length=work.length,
        efficiency=how.efficiency,
    )
    return Times(
        sampling=case.sampling_seconds() if sampling is None else sampling,
        scoring=work.passes * one / 3,
        training=work.epochs * recomputing * one,
        reduction=work.epochs * work.updates * reduction,
        sync=case.sync_seconds(),
        overlap=case.overlap,
        overhead=case.constants.step_overhead,
        offload=2 * saved / case.constants.host_copy,
    )


def _stages_to_see(shape: ModelShape, parallel: ParallelConfig) -> Sequence[int]:
    """The stages that can be the fullest: the first and the last. The stages between have no embedding and no head, and
    keep fewer activations than the first. All stages are returned if they have unequal lengths, or if only some layers
    have experts."""
    if parallel.stages or (shape.experts is not None and shape.experts.dense_layers):
        return range(parallel.pipeline)
    return sorted({0, parallel.pipeline - 1})


_KEPT = {False: "weights, gradients and optimizer state", True: "weights"}


def _problems(
    case: Case,
    stages: Sequence[StageMemory],
    server: ServerMemory | None,
    training_peak: float,
    sampling_peak: float,
) -> list[str]:
    gpu, found = case.cluster.gpu, []
    if training_peak > gpu.memory:
        worst = max(stages, key=lambda stage: stage.total)
        found.append(
            f"training needs {gb(training_peak)} on a GPU of pipeline stage {worst.stage} ({gb(worst.static)} of "
            f"weights, gradients and optimizer state, {gb(worst.activations + worst.head)} of activations), "
            f"{_beyond(training_peak, gpu)}"
        )
    if server is None:
        return found
    if sampling_peak > gpu.visible:
        found.append(
            f"sampling needs {gb(sampling_peak)}: vLLM's {gb(server.reserved)} beside "
            f"{gb(max(_beside(case, stage) for stage in stages))} of the trainer's {_KEPT[case.offload]}, "
            f"{(sampling_peak - gpu.visible) / GB:.1f} GB more than the {gb(gpu.visible)} that an {gpu.name} shows to "
            "vLLM; lower rollout.gpu_memory_utilization"
        )
    if server.tokens < case.work.longest:
        found.append(
            f"vLLM's KV cache holds {server.tokens} tokens, one sample may have {case.work.longest}: of "
            f"{gb(server.reserved)} a GPU, weights take {gb(server.weights)} and vLLM itself "
            f"{gb(case.constants.server_bytes)}; raise rollout.tensor or rollout.gpu_memory_utilization"
        )
    return found


def _warnings(case: Case) -> Iterator[str]:
    push = case.sync_seconds()
    if case.push_limit_s is not None and push > case.push_limit_s:
        yield (
            f"a weight push over {case.chosen_transport} takes about {push:.0f} s, longer than timeouts.weight_push_s "
            f"({case.push_limit_s:.0f} s): the run would end at its first push; use nodes that only sample "
            "(--rollout-nodes), or raise the limit"
        )


def _beyond(needed: float, gpu: Gpu) -> str:
    return f"{(needed - gpu.memory) / GB:.1f} GB more than the {gpu.memory / GB:.0f} GB of an {gpu.name}"


def _demonstrations(run: RunConfig, method: Method) -> int:
    """Number of demonstrations of a step: those of the batch, or one for each prompt."""
    if method.draws_demonstrations:
        return run.batch.demonstrations
    return run.batch.prompts if method.needs_demonstrations else 0


def _mean(what: str, stated: float | None, limit: int) -> float:
    if stated is None:
        return limit / 4
    if not 0 < stated <= limit:
        raise ValueError(f"mean {what} tokens {stated:g} must lie in (0, {limit}], the settings' limit")
    return stated
