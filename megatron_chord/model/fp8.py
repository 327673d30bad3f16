"""FP8 training with Transformer Engine: a check of the model's sizes, Megatron's settings, and the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_chord.config import ParallelConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.precision import PRESETS, Fp8Training, Precision, preset


def check_fp8(shape: ModelShape, parallel: ParallelConfig, precision: Precision | None) -> None:
    """Check that the matrix sizes of a rank fit this precision. Needs no process group. Raises ValueError if not."""
    training = preset(precision).training
    broken = _not_multiples(shape, parallel, training) if training is not None else []
    if training is None or not broken:
        return
    unit = "blocks of 128" if training.recipe == "blockwise" else "multiples of 16"
    raise ValueError(
        f"precision {precision} computes in {unit}, which does not divide on each rank: {'; '.join(broken)}. "
        f"Possible instead: {'; '.join(_alternatives(shape, parallel, precision))}"
    )


def matrix_sizes(shape: ModelShape, parallel: ParallelConfig) -> Iterator[tuple[str, int]]:
    """The numbers of rows and columns of a rank's matrices, with a description of each. Head and embedding are in BF16
    and not listed.

    The narrow outputs of latent attention's replicated down-projections are not listed either: that of DeepSeek-V3 has
    576 rows, and NVIDIA trains it with blocks of 128 (NeMo-RL's performance summary, 0.6).
    """
    tensor, transformer = parallel.tensor, shape.transformer
    over = f" / tensor {tensor}" if tensor > 1 else ""
    heads, groups = shape.num_heads // tensor, shape.num_kv_heads // tensor
    yield f"hidden size {shape.hidden_size}", shape.hidden_size
    if shape.has_latent_attention:
        key, value = transformer["qk_head_dim"], transformer["v_head_dim"]
        yield f"queries of {shape.num_heads} heads{over}", heads * (key + transformer["qk_pos_emb_head_dim"])
        yield f"keys and values of {shape.num_heads} heads{over}", heads * (key + value)
        yield f"attention output of {shape.num_heads} heads{over}", heads * value
        for name in ("q_lora_rank", "kv_lora_rank"):
            if transformer.get(name):
                yield f"{name} {transformer[name]}", transformer[name]
    else:
        width = transformer.get("kv_channels") or shape.hidden_size // shape.num_heads
        yield f"queries, keys and values of {shape.num_heads} heads{over}", (heads + 2 * groups) * width
        yield f"attention output of {shape.num_heads} heads{over}", heads * width
    if shape.experts is None or shape.experts.dense_layers:
        yield f"MLP width {shape.ffn_size}{over}", shape.ffn_size // tensor
    if shape.experts is not None:
        width = transformer["moe_ffn_hidden_size"]
        yield f"expert width {width}", width
        if shape.experts.shared_ffn_size:
            shared = shape.experts.shared_ffn_size
            yield f"shared expert's width {shared}{over}", shared // tensor


def transformer_settings(training: Fp8Training | None) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    if training is None:
        return {}
    return {
        "fp8": training.number_format,
        "fp8_recipe": training.recipe,
        # The weights stay in BF16, with FP8 copies: the pushed and saved weights are exactly the trained ones.
        "fp8_param": False,
        "first_last_layers_bf16": training.first_last_bf16,
    }


def optimizer_settings(training: Fp8Training | None) -> dict[str, Any]:
    """Fields of Megatron's OptimizerConfig."""
    if training is None:
        return {}
    return {"fp8_recipe": training.recipe, "use_precision_aware_optimizer": False}


def set_environment(precision: Precision | None) -> None:
    """Set the variables that Transformer Engine reads when it is imported. Call it before Megatron-Core is
    imported, because it imports Transformer Engine.

    Raises RuntimeError if Transformer Engine is already imported and the variables had other values.
    """
    training = preset(precision).training
    wanted: Mapping[str, str] = training.environment if training is not None else {}
    missing = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    if missing and "transformer_engine" in sys.modules:
        settings = " ".join(f"{name}={value}" for name, value in missing.items())
        raise RuntimeError(f"Transformer Engine was imported before its settings were made: set {settings}")
    os.environ.update(missing)


def _not_multiples(shape: ModelShape, parallel: ParallelConfig, training: Fp8Training) -> list[str]:
    sizes = matrix_sizes(shape, parallel)
    return [f"{name} = {size}" for name, size in sizes if size % training.multiple]


def _alternatives(shape: ModelShape, parallel: ParallelConfig, precision: Precision | None) -> Iterator[str]:
    for other, settings in PRESETS.items():
        training = settings.training
        if other != precision and training and not _not_multiples(shape, parallel, training):
            yield f"precision {other}"
    training = preset(precision).training
    assert training is not None
    smaller = [size for size in range(1, parallel.tensor) if parallel.tensor % size == 0]
    fits = [size for size in smaller if not _not_multiples(shape, _with_tensor(parallel, size), training)]
    if fits:
        yield f"parallel.tensor {max(fits)}"
    yield "precision fp8_rollout, or none (BF16 training)"


def _with_tensor(parallel: ParallelConfig, tensor: int) -> ParallelConfig:
    return replace(parallel, tensor=tensor, sequence_parallel=parallel.sequence_parallel and tensor > 1)
