"""Builds Megatron's TransformerConfig and this rank's model chunks, and lists their parameters by global name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_chord.config import ModelConfig, ParallelConfig
from megatron_chord.costs.balance import balanced_stages
from megatron_chord.costs.stages import chunk_lengths
from megatron_chord.families.shape import ModelShape
from megatron_chord.model.fp8 import transformer_settings
from megatron_chord.model.rope import scaled_frequencies
from megatron_chord.model.specs import block_spec, has_transformer_engine
from megatron_chord.precision import Fp8Training
from megatron_chord.runtime.parallel import axis_sizes
from megatron_chord.weights.mapping import global_name, padded_vocab_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ACTIVATIONS = {"silu": F.silu}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
_SHAPE_FIELDS = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
_NOT_TO_OVERRIDE = {
    "hidden_dropout": "dropout would make every ratio of the loss noise",
    "attention_dropout": "dropout would make every ratio of the loss noise",
    "calculate_per_token_loss": "it divides both branches of the loss by one count",
    "variable_seq_lengths": "packed micro-batches differ in length",
    "perform_initialization": "weights are always read from a checkpoint",
    **dict.fromkeys(
        (
            "cuda_graph_impl",
            "cuda_graph_modules",
            "cuda_graph_scope",
            "enable_cuda_graph",
            "external_cuda_graph",
        ),
        "packed micro-batches differ in length, and rollout.offload changes addresses",
    ),
    "overlap_p2p_comm": "it follows from parallel.virtual_pipeline",
    "batch_p2p_comm": "it follows from parallel.virtual_pipeline",
    "moe_enable_routing_replay": "rollout.router_replay sets it, without Megatron's class",
    "params_dtype": "model.dtype sets it",
    "pipeline_dtype": "model.dtype sets it",
    "use_cpu_initialization": "it follows from the device",
    "bf16": "model.dtype sets it",
    "fp16": "model.dtype is fp32 or bf16",
    "sequence_parallel": "parallel.sequence_parallel sets it",
    **{
        f"{axis}_parallel_size": f"parallel.{name} sets it"
        for axis, name in {
            "tensor_model": "tensor",
            "pipeline_model": "pipeline",
            "virtual_pipeline_model": "virtual_pipeline",
            "context": "context",
            "expert_model": "expert",
        }.items()
    },
    **dict.fromkeys(
        (
            "pipeline_model_parallel_layout",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        ),
        "parallel.stages sets it",
    ),
    "expert_tensor_parallel_size": "it is 1: experts are not cut over the tensor axis; parallel.expert distributes "
    "them",
    **dict.fromkeys(("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16"), "precision sets it"),
    **dict.fromkeys(
        ("fp8_dot_product_attention", "fp8_multi_head_attention"),
        "attention is computed in BF16 under every precision",
    ),
    **dict.fromkeys(("fp4", "fp4_param"), "there is no FP4 training here"),
    **dict.fromkeys(
        (
            "use_mup",
            "mup_attn_scale_power",
            "mup_base_head_dim",
            "mup_base_hidden_size",
            "mup_embedding_mult",
            "mup_output_mult",
            "mup_width_mult",
        ),
        "it would scale the model that the checkpoint holds",
    ),
    **dict.fromkeys(
        (
            "expert_gtp_weight_remat_size",
            "expert_tensor_parallel_num_weight_shards",
            "gtp_weight_remat_size",
            "tensor_parallel_num_weight_shards",
        ),
        "weights are cut only over the tensor axis",
    ),
    **dict.fromkeys(
        ("mla_down_proj_fusion", "moe_single_grouped_bias", "moe_single_grouped_weight"),
        "conversion and weight sync read these weights one by one",
    ),
}


def check_shape(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Check that this model can be distributed over these axes. Needs no process group. Raises ValueError if not."""
    cut = _cut_over_tensor(shape)
    broken = [f"{name} / tensor {parallel.tensor}" for name, size in cut.items() if size % parallel.tensor]
    if broken:
        common = math.gcd(*cut.values())
        sizes = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        broken[-1] += f" (parallel.tensor can be {sizes} for this model)"
    if shape.experts is not None and shape.experts.count % parallel.expert:
        broken.append(f"{shape.experts.count} experts / parallel.expert {parallel.expert}")
    if parallel.stages is None and shape.num_layers % parallel.num_chunks:
        broken.append(
            f"{shape.num_layers} layers / (parallel.pipeline {parallel.pipeline} x parallel.virtual_pipeline "
            f"{parallel.virtual_pipeline or 1}){_unequal(shape, parallel)}"
        )
    if broken:
        raise ValueError("impossible parallel sizes, these are not divisible: " + "; ".join(broken))
    if parallel.stages is not None and sum(parallel.stages) != shape.num_layers:
        raise ValueError(
            f"parallel.stages {list(parallel.stages)} are {sum(parallel.stages)} layers together, the model has "
            f"{shape.num_layers}{_unequal(shape, parallel)}"
        )
    if shape.experts is None and parallel.expert > 1:
        raise ValueError(
            f"parallel.expert is {parallel.expert}, but {shape.family} has no experts to distribute"
        )
    if shape.has_latent_attention and parallel.tensor > 1 and not parallel.sequence_parallel:
        # That gradient is reduced only in megatron/core/transformer/multi_latent_attention.py (0.16.1: 596,
        # 0.19.2: 752), and only with sequence parallelism.
        raise ValueError(
            f"parallel.tensor is {parallel.tensor}: Megatron sums the gradient of the keys that all heads share "
            f"({shape.family}'s latent attention) over a tensor axis only with parallel.sequence_parallel"
        )
    if shape.experts is not None and parallel.tensor > 1 and not parallel.sequence_parallel:
        # megatron/core/transformer/moe/moe_layer.py (0.16.1: 379, 0.19.2: 629)
        raise ValueError(
            f"parallel.tensor is {parallel.tensor}: Megatron trains experts ({shape.family}) with a tensor axis "
            "only with parallel.sequence_parallel"
        )


def _unequal(shape: ModelShape, parallel: ParallelConfig) -> str:
    """A suggestion for ``parallel.stages``, if there are enough layers."""
    if shape.num_layers < parallel.num_chunks:
        return ""
    chunks = parallel.virtual_pipeline or 1
    stages = balanced_stages(shape, pipeline=parallel.pipeline, chunks=chunks, length=0.0, recompute="none")
    return f" (parallel.stages can be {list(stages)})"


def _cut_over_tensor(shape: ModelShape) -> dict[str, int]:
    """The sizes that are cut over the tensor axis and must be divisible by it. Experts are not cut."""
    cut = {
        f"{shape.num_heads} attention heads": shape.num_heads,
        f"{shape.num_kv_heads} key-value heads": shape.num_kv_heads,
    }
    if shape.experts is None or shape.experts.dense_layers:
        cut[f"MLP width {shape.ffn_size}"] = shape.ffn_size
    if shape.experts is not None and shape.experts.shared_ffn_size is not None:
        cut[f"shared expert's width {shape.experts.shared_ffn_size}"] = shape.experts.shared_ffn_size
    return cut


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, fp8: Fp8Training | None = None
) -> Any:
    """Megatron-Core's TransformerConfig.

    Raises:
        ValueError: an override is not a field of it, or FP8 without Transformer Engine and a CUDA device.
    """
    dtype = DTYPES[model.dtype]
    fused = has_transformer_engine()
    if fp8 is not None and not fused:
        # Megatron would ignore it: without Transformer Engine its FP8 context does nothing (fp8_utils.py).
        raise ValueError("FP8 training needs a CUDA device and Transformer Engine")
    settings: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "ffn_hidden_size": shape.ffn_size,
        **shape.transformer,
        "activation_func": _ACTIVATIONS[shape.transformer["activation_func"]],
        **axis_sizes(parallel),
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Megatron's defaults are 0.1, which would make every ratio of the loss noise.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are always read from a checkpoint.
        "perform_initialization": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Packed micro-batches differ in length, so pipeline stages send the shapes first. Megatron then needs this
        # dispatcher, also for models without experts.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": fused and shape.experts is not None,
        # Without fusion a token's experts are added up in BF16 and by atomic operations, in an order that changes
        # (moe_utils.py, unpermute). The fused kernel adds in FP32 and in the order of the experts.
        "moe_permute_fusion": fused and shape.experts is not None,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        # With fusion, Megatron's latent attention would use Megatron's YaRN.
        "apply_rope_fusion": fused and not shape.has_latent_attention,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": fused and _has_gradient_kernel(),
        **transformer_settings(fp8),
    }
    if parallel.stages is not None:
        settings["pipeline_model_parallel_layout"] = _pipeline_layout(shape, parallel)
    if parallel.virtual_pipeline:
        # Without overlapped sends, two stages with virtual chunks mix up their messages: the loss is wrong, without an
        # error.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    settings |= _RECOMPUTE[model.recompute]
    check_overrides(model.megatron_overrides, shape)
    merged: dict[str, Any] = settings | dict[str, Any](model.megatron_overrides)
    if "attention_backend" in merged:
        merged["attention_backend"] = _attention_backend(merged["attention_backend"])
    return _config_class(shape)(**merged)


def _pipeline_layout(shape: ModelShape, parallel: ParallelConfig) -> list[list[str]]:
    """The layers of each model chunk, in Megatron's notation (transformer/pipeline_parallel_layer_layout.py)."""
    layout = [["decoder"] * length for length in chunk_lengths(shape.num_layers, parallel)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _attention_backend(name: Any) -> Any:
    """Megatron's enum value. By default Transformer Engine chooses between flash, fused and unfused attention."""
    from megatron.core.transformer.enums import AttnBackend

    if name not in AttnBackend.__members__:
        known = ", ".join(AttnBackend.__members__)
        raise ValueError(f"model.megatron_overrides: attention_backend {name!r} is none of {known}")
    return AttnBackend[name]


def _has_gradient_kernel() -> bool:
    """True if NVIDIA's Apex is installed with the kernel that accumulates weight gradients in fp32.

    Only some images have it. Transformer Engine has its own kernel, but Megatron's embedding and head use the same
    setting and need that of Apex.
    """
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available


def _config_class(shape: ModelShape) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    return MLATransformerConfig if shape.has_latent_attention else TransformerConfig


def build_chunks(config: Any, shape: ModelShape) -> list[Any]:
    """This rank's PolicyModel chunks (one, or one for each virtual stage), with uninitialised weights."""
    from megatron.core import parallel_state

    from megatron_chord.model.packed import pass_on_padding
    from megatron_chord.model.policy import PolicyModel

    count = config.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(count) if count else [None]:
        where: dict[str, Any] = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        chunk = PolicyModel(
            config,
            block_spec(config, vp_stage),
            vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_percent=1.0,
            rotary_base=shape.rope.base,  # type: ignore[arg-type]
            vp_stage=vp_stage,
        )
        _scale_rope(chunk, shape)
        _keep_expert_bias(chunk)
        pass_on_padding(chunk)
        _mark_parameters(chunk, shape)
        chunks.append(chunk if config.use_cpu_initialization else chunk.cuda())
    return chunks


def _scale_rope(chunk: Any, shape: ModelShape) -> None:
    """Set the scaled RoPE frequencies. Latent attention has a RoPE in each layer, other attention one for the chunk."""
    holders = (
        [layer.self_attention for layer in chunk.decoder.layers] if shape.has_latent_attention else [chunk]
    )
    for holder in holders:
        rope: Any = holder.rotary_pos_emb
        rope.inv_freq = scaled_frequencies(rope.inv_freq, shape.rope)


def _keep_expert_bias(chunk: Any) -> None:
    """Keep the expert bias of the routers constant, by switching off their token counts.

    Megatron changes the bias by sign(mean - count) x update rate, and the rate is 0. But it also sums the counts over
    the ranks at each step (moe/moe_utils.py:1067) and expects the training loop to reset them. Without a reset they
    would overflow, and the bias would become NaN.
    """
    for module in chunk.modules():
        if hasattr(module, "enable_expert_bias"):
            module.enable_expert_bias = False


def _mark_parameters(chunk: Any, shape: ModelShape) -> None:
    """Mark the parameters that are cut over the tensor axis, and those that are reduced as experts.

    The first mark: Megatron-Core 0.16.1 sets it only when it initialises weights (tensor_parallel/layers.py:137, 170).
    Without the mark, only the first rank's parts count in the gradient norm, so clipping would depend on the layout.
    Transformer Engine marks every linear layer, also the replicated ones of latent attention
    (pytorch/module/linear.py), and every rank would count their gradients. Experts get this mark, too, as in Megatron:
    their norm is summed over the ranks that hold different experts.

    The second mark: Megatron sets it only with an expert axis (layers.py:886, 1209). But experts are not cut, so they
    are replicated over the tensor axis. Without the mark their gradient would lack the tokens of the other
    tensor-parallel ranks.

    0.19.2 sets both as we do (layers.py:994 and 961), but does not correct Transformer Engine's marks.
    """
    for name, parameter in global_parameters([chunk]).items():
        rule = shape.weights.entry(name).rule
        if rule.of_expert:
            parameter.allreduce = False  # type: ignore[attr-defined]
        is_cut = rule.of_expert or rule.transform.axis is not None
        parameter.tensor_model_parallel = is_cut  # type: ignore[attr-defined]


def global_parameters(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """This rank's parameters by global name (layers and experts numbered over the whole model)."""
    return {
        name: parameter for chunk in chunks for name, parameter in _named(chunk, chunk.named_parameters())
    }


def global_weights(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """The parameters, and the buffers that the forward pass reads and that a checkpoint of the model has."""
    weights = global_parameters(chunks)
    for chunk in chunks:
        saved = chunk.state_dict(keep_vars=True)
        weights |= _named(chunk, ((name, buffer) for name, buffer in chunk.named_buffers() if name in saved))
    return weights


def _named(chunk: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    layers = chunk.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    of_layers = [getattr(layer.mlp, "local_expert_indices", None) for layer in layers]
    first_expert = next((indices[0] for indices in of_layers if indices), 0)
    for name, tensor in tensors:
        yield global_name(name, first_layer=first_layer, first_expert=first_expert), tensor


def check_overrides(overrides: Mapping[str, Any], shape: ModelShape) -> None:
    """Check overrides. Raises ValueError for a name that is not a field of Megatron's TransformerConfig or that must
    not be changed."""
    if not overrides:
        return
    for name in overrides:
        reason = _NOT_TO_OVERRIDE.get(name)
        if name in shape.transformer or name in _SHAPE_FIELDS:
            reason = "the model's config.json sets it"
        if reason is not None:
            raise ValueError(f"model.megatron_overrides: {name} cannot be set: {reason}")
    fields = [field.name for field in dataclasses.fields(_config_class(shape))]
    for name in overrides:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"model.megatron_overrides: {name!r} is not a field of Megatron's TransformerConfig{hint}"
            )
