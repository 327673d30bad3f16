"""Estimates the memory of a training GPU by part, for every pipeline stage, and the memory of a vLLM server.

Formulas and their sources: docs/planning.md, "Memory". Bytes are decimal (1 GB = 1e9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from megatron_chord.config import ParallelConfig
from megatron_chord.costs.gpus import Gpu
from megatron_chord.costs.parameters import Count, Sizes, model_count, rank_count, uncut_count
from megatron_chord.costs.stages import stage_chunks
from megatron_chord.families.shape import ModelShape
from megatron_chord.losses.logprobs import CHUNK_BYTES
from megatron_chord.plan.constants import CONSTANTS, GB, Constants
from megatron_chord.weights.mapping import padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Bytes per parameter, as ``train/state.py`` sets Megatron's optimizer up; the defaults are BF16 training."""

    weights: float = 2
    gradients: float = 4
    """Gradients, in FP32 because ``grad_reduce_in_fp32`` is on."""
    optimizer: float = 12
    """FP32 master weights and Adam's two moments."""
    activation: float = 2
    """Bytes of one number that is kept for the backward pass."""
    gemm_input: float = 2
    """Bytes of one number of a kept input of a matrix product; 1 in FP8."""
    cached_weights: float = 0
    """Quantised copies that Transformer Engine keeps of the weights, row-wise and transposed."""

    @classmethod
    def of(cls, dtype: str, *, fp8: bool = False) -> Numerics:
        if dtype == "fp32":
            return cls(weights=4, optimizer=8, activation=4, gemm_input=4)
        return cls(gemm_input=1, cached_weights=2) if fp8 else cls()


@dataclass(frozen=True, kw_only=True)
class Training:
    """The properties of a layout and of its micro-batches that determine memory."""

    parallel: ParallelConfig
    data: int
    """Data-parallel ranks, without the context axis."""
    micro_tokens: int
    """Number of tokens of the largest micro-batch, before it is split over the context axis."""
    micro_batches: int
    """Number of micro-batches of each data-parallel rank in one optimizer update."""
    recompute: str
    """none, mlp or full."""
    numerics: Numerics = field(default_factory=Numerics)
    reference: bool = False
    """True if the weights of a reference policy are also kept."""

    @property
    def local_tokens(self) -> float:
        """Number of tokens of a micro-batch on one context-parallel rank."""
        return self.micro_tokens / self.parallel.context

    @property
    def sequence_cut(self) -> int:
        """Number of tensor-parallel ranks over which residuals and norms are split along the sequence."""
        return self.parallel.tensor if self.parallel.sequence_parallel else 1


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one GPU of one pipeline stage at the peak of training."""

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    head: float
    """Chunked log-probs, on the last stage."""
    overhead: float
    """Memory of CUDA and NCCL, and memory lost to fragmentation."""

    @property
    def static(self) -> float:
        """Bytes that stay allocated between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def saved(self) -> float:
        """Bytes of the static part that ``train/offload.py`` moves to the host's memory while servers sample."""
        return self.optimizer + self.reference

    @property
    def beside_servers(self) -> float:
        """Bytes that stay on the GPU while servers sample. Gradients are freed."""
        return self.static - self.saved - self.gradients

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("stage", "parameters")}


@dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """One vLLM server of ``tensor`` GPUs."""

    tensor: int
    weights: float
    """Bytes per GPU."""
    cache: float
    """KV cache, bytes per GPU; negative when the weights leave nothing."""
    reserved: float
    """Total of the server, bytes per GPU."""
    tokens: int
    """KV capacity of the whole server."""


def stage_memory(
    shape: ModelShape, training: Training, stage: int, constants: Constants = CONSTANTS
) -> StageMemory:
    """One GPU of pipeline stage ``stage``."""
    numerics, count = training.numerics, rank_count(shape, training.parallel, stage)
    activations = activation_bytes(shape, training, stage)
    head = head_bytes(shape, training) if stage == training.parallel.pipeline - 1 else 0.0
    return StageMemory(
        stage=stage,
        parameters=count.total,
        weights=(numerics.weights + numerics.cached_weights) * count.total,
        gradients=numerics.gradients * count.total,
        optimizer=optimizer_bytes(count, training),
        reference=numerics.weights * count.total if training.reference else 0.0,
        activations=activations,
        head=head,
        overhead=constants.cuda_bytes + constants.fragmentation * (activations + head),
    )


def optimizer_bytes(count: Count, training: Training) -> float:
    """Bytes of optimizer state. It is sharded over the ranks with the same weights; for experts, over those with the
    same experts, which are fewer."""
    parallel, per_parameter = training.parallel, training.numerics.optimizer
    if not parallel.distributed_optimizer:
        return per_parameter * count.total
    replicas = training.data * parallel.context
    # Experts are not cut over the tensor axis, so its ranks hold the same ones, too (runtime/parallel.py).
    expert_replicas = replicas * parallel.tensor / parallel.expert
    return per_parameter * (count.dense / replicas + count.experts / expert_replicas)


def activation_bytes(shape: ModelShape, training: Training, stage: int) -> float:
    """Bytes that are kept for the backward pass at the peak of the schedule, and the largest recomputed part."""
    numbers = stage_chunks(shape.num_layers, training.parallel, stage)
    dense = shape.experts.dense_layers if shape.experts else ()
    of_kind = {
        is_dense: layer_activations(shape, training, number)
        for is_dense, number in {number in dense: number for chunk in numbers for number in chunk}.items()
    }
    chunks = [[of_kind[number in dense] for number in chunk] for chunk in numbers]
    kept = kept_at_once(
        [sum(layer.kept for layer in chunk) for chunk in chunks],
        training.parallel,
        stage,
        training.micro_batches,
    )
    again = max(layer.again for chunk in chunks for layer in chunk)
    return (kept + again) * training.local_tokens


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Activations of one layer, in bytes per token of a context-parallel rank."""

    kept: float
    """Kept from the forward pass to the backward pass."""
    again: float = 0.0
    """Computed again in the backward pass."""


def layer_activations(shape: ModelShape, training: Training, number: int = 0) -> LayerActivations:
    """The activations of layer ``number``."""
    of, hidden, experts = Sizes.of(shape), shape.hidden_size, shape.experts
    full, gemm = training.numerics.activation, training.numerics.gemm_input
    # Inputs of both norms; inputs of the products behind them, which are those norms' outputs. Latents likewise.
    whole = (2 * full + 2 * gemm) * hidden + (full + gemm) * of.latents
    attention = full * (of.query + of.key + of.value + of.attended)
    # Outputs of the projections into an MLP, and the activation's output, which the last product reads.
    per_width = of.gates * full + gemm
    if experts is None or number in experts.dense_layers:
        mlp, expert = per_width * shape.ffn_size, 0.0
    else:
        mlp = per_width * (experts.shared_ffn_size or 0)
        # Each token travels to top_k experts and back: its copies there, and what comes back.
        expert = of.top_k * (per_width * of.expert_width + (gemm + full) * hidden)
    outside = attention / training.parallel.tensor + whole / training.sequence_cut
    inside = mlp / training.parallel.tensor + expert / training.sequence_cut
    if training.recompute == "full":
        return LayerActivations(kept=full * hidden / training.sequence_cut, again=outside + inside)
    if training.recompute == "mlp":
        return LayerActivations(kept=outside, again=inside)
    return LayerActivations(kept=outside + inside)


def kept_at_once(chunks: Sequence[float], parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """The most that one rank keeps at the same time, for forward passes whose backward pass has not run yet.

    Megatron-Core 0.16.1, pipeline_parallel/schedules.py: after the warm-up of the 1F1B schedule or of the interleaved
    one, a forward and a backward pass take turns. A chunk has as many passes in a row as there are stages, then the
    next one has; backward the last chunk is the first.

    Args:
        chunks: what one pass through each of the rank's chunks leaves behind.
    """
    stages, count = parallel.pipeline, len(chunks)
    if count == 1:
        return chunks[0] * min(stages - stage, micro_batches)
    warm_up = 2 * (stages - stage - 1) + (count - 1) * stages + 1
    passes = count * micro_batches
    kept = sum(chunks[number // stages % count] for number in range(min(warm_up, passes)))
    most = kept
    for done in range(min(passes - warm_up, count * stages)):  # from here the schedule repeats itself
        freed, added = chunks[-1 - done // stages % count], chunks[(warm_up + done) // stages % count]
        kept += added - freed
        most = max(most, kept)
    return most


def head_bytes(shape: ModelShape, training: Training) -> float:
    """Work space of ``losses.logprobs`` in its backward pass, if every token of the micro-batch is trained."""
    tensor, element = training.parallel.tensor, training.numerics.activation
    rows = padded_vocab_size(shape.vocab_size, tensor) / tensor
    # The weight's gradient is summed in FP32, and then rounded to the weights' type.
    weight = (4 + element) * rows * shape.hidden_size
    # The gathered hidden states, those that predict a trained token, and the gradients of both.
    hidden = 4 * element * training.local_tokens * shape.hidden_size
    return CHUNK_BYTES + weight + hidden


def full_logits_bytes(vocab_rows: float, tokens: float) -> float:
    """Memory of a head that computes all logits at once: logits in BF16 and in FP32, and their gradient."""
    return tokens * vocab_rows * (2 + 4 + 4)


def kv_bytes_per_token(shape: ModelShape, dtype_bytes: float = 2) -> float:
    """Bytes that vLLM keeps for one token in all layers: keys and values, or the latent from which they are
    computed."""
    return shape.num_layers * Sizes.of(shape).cache * dtype_bytes


def cache_parts(shape: ModelShape, tensor: int) -> int:
    """Number of parts into which a server of ``tensor`` GPUs splits its KV cache. If there are more GPUs than key-value
    heads, vLLM keeps copies of the heads. A latent is shared by all heads, so every GPU keeps all of it."""
    return 1 if shape.has_latent_attention else min(tensor, shape.num_kv_heads)


def server_count(shape: ModelShape, tensor: int) -> float:
    """Parameters on one of a server's ``tensor`` GPUs."""
    uncut = uncut_count(shape)
    return uncut + (model_count(shape) - uncut) / tensor


def server_memory(
    shape: ModelShape,
    gpu: Gpu,
    *,
    tensor: int,
    utilization: float,
    weight_bytes: float = 2,
    kv_dtype_bytes: float = 2,
    cache_bytes: float | None = None,
    constants: Constants = CONSTANTS,
) -> ServerMemory:
    """Weights and KV cache of a vLLM server that uses the share ``utilization`` of each of its GPUs.

    Args:
        weight_bytes: per parameter: 2 in BF16, 1 in FP8, 4 in FP32.
        cache_bytes: the KV cache's size per GPU, where the settings state it.
    """
    weights = weight_bytes * server_count(shape, tensor)
    own = weights + constants.server_bytes
    reserved = utilization * gpu.visible if cache_bytes is None else own + cache_bytes
    cache = reserved - own
    per_token = kv_bytes_per_token(shape, kv_dtype_bytes) / cache_parts(shape, tensor)
    return ServerMemory(
        tensor=tensor,
        weights=weights,
        cache=cache,
        reserved=reserved,
        tokens=max(0, int(cache / per_token)),
    )


def gb(value: float) -> str:
    return f"{value / GB:.1f} GB"
