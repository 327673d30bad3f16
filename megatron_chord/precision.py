"""Number formats: what each value of ``precision`` sets in the trainer and in vLLM, and what hardware it needs.

Sources: Megatron-Core 0.16.1 (transformer_config.py, fp8_utils.py), Transformer Engine 2.11 (common/recipe,
pytorch/quantization.py), vLLM 0.32 (config/quantization.py), NVIDIA's FP8 recipes for reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Precision = Literal["bf16", "fp8_rollout", "fp8_e2e", "fp8_tensorwise"]
Quantization = Literal["fp8_per_block", "fp8_per_tensor"]


@dataclass(frozen=True, kw_only=True)
class Fp8Training:
    """The trainer computes the matrix products of its layers in FP8. Weights, head, norms, router and attention stay in
    BF16."""

    number_format: Literal["e4m3", "hybrid"]
    """hybrid: E5M2 for the gradients of outputs, E4M3 for everything else."""
    recipe: Literal["blockwise", "tensorwise"]
    """blockwise: one scale for each block of 1 x 128 activations or gradients and of 128 x 128 weights. tensorwise: one
    scale for each tensor, computed from its present values."""
    multiple: int
    """Every size of a rank's matrix products must be a multiple of this: its tokens, and rows and columns of
    weights."""
    first_last_bf16: bool = False
    """True if the first and the last layer stay in BF16."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment variables that Transformer Engine reads when it is imported."""


@dataclass(frozen=True, kw_only=True)
class Fp8Rollouts:
    """vLLM quantises the BF16 weights that it receives, and the activations while it computes."""

    quantization: Quantization
    """Value of vLLM's --quantization."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Preset:
    training: Fp8Training | None = None
    rollouts: Fp8Rollouts | None = None
    capability: tuple[int, int] = (0, 0)
    """Lowest CUDA compute capability of every device."""
    cuda: tuple[int, int] = (0, 0)
    """Lowest CUDA version that torch is built for."""


# Scales are arbitrary fp32 numbers in trainer and vLLM. By default both round them to powers of 2 on Hopper.
_BLOCKS = Fp8Rollouts(quantization="fp8_per_block", environment={"VLLM_USE_DEEP_GEMM_E8M0": "0"})
PRESETS: dict[Precision, Preset] = {
    "bf16": Preset(),
    "fp8_rollout": Preset(rollouts=_BLOCKS, capability=(9, 0)),
    "fp8_e2e": Preset(
        training=Fp8Training(
            number_format="e4m3",
            recipe="blockwise",
            multiple=128,
            environment={"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"},
        ),
        rollouts=_BLOCKS,
        # transformer_engine/pytorch/quantization.py, check_fp8_block_scaling_support
        capability=(9, 0),
        cuda=(12, 9),
    ),
    "fp8_tensorwise": Preset(
        training=Fp8Training(number_format="hybrid", recipe="tensorwise", multiple=16, first_last_bf16=True),
        rollouts=Fp8Rollouts(quantization="fp8_per_tensor"),
        # the same file, check_fp8_support
        capability=(8, 9),
        cuda=(12, 1),
    ),
}
assert tuple(PRESETS) == get_args(Precision)


def preset(precision: Precision | None) -> Preset:
    """The preset of a run's ``precision``. Without a precision: a preset that changes nothing."""
    return PRESETS[precision] if precision is not None else Preset()


def batch_multiple(training: Fp8Training, *, tensor: int, context: int, sequence_parallel: bool) -> int:
    """The number of which a packed micro-batch's length is a multiple, so that each rank's tokens fit FP8 products.

    The rule is that of NVIDIA NeMo-RL (nemo_rl/models/megatron/data.py): the recipe's multiple, times 2 x context with
    context parallelism, times tensor with sequence parallelism. Pipeline stages do not matter: the length is sent with
    each micro-batch, so micro-batches may have different lengths.
    """
    return training.multiple * (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1)
