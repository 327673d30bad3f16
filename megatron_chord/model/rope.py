"""RoPE's frequencies for contexts longer than the model was first trained on.

Megatron-Core 0.16.1 implements Llama 3's scaling with fixed constants (low 1, high 4, 8192 positions;
models/common/embeddings/rotary_pos_embedding.py:92) and linear scaling by fractional positions. Here the frequencies
are those of Transformers 5 (modeling_rope_utils.py), bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_chord.families.shape import LinearScaling, Llama3Scaling, Rope, YarnScaling


def scaled_frequencies(frequencies: Tensor, rope: Rope) -> Tensor:
    """Scale the plain frequencies [head_dim / 2] of ``rope.base``."""
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / factor
        case Llama3Scaling():
            return _llama3(frequencies, rope.scaling)
        case YarnScaling():
            return _yarn(2 * len(frequencies), rope.base, rope.scaling, frequencies.device)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    long = wavelength > scaling.original_max_positions / low
    short = wavelength < scaling.original_max_positions / high
    slowed = torch.where(long, frequencies / scaling.factor, frequencies)
    share = (scaling.original_max_positions / wavelength - low) / (high - low)
    between = (1 - share) * slowed / scaling.factor + share * slowed
    return torch.where(~short & ~long, between, slowed)


def _yarn(head_dim: int, base: float, scaling: YarnScaling, device: torch.device) -> Tensor:
    def dimension(turns: float) -> float:
        """The dimension that makes ``turns`` rotations over the original positions."""
        wavelengths = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(base))

    low, high = math.floor(dimension(scaling.beta_fast)), math.ceil(dimension(scaling.beta_slow))
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    order = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    kept = 1 - ((order - low) / (high - low)).clamp(0, 1)
    # Computed from wavelengths, as in Transformers: computing with frequencies would round differently.
    wavelengths = base ** (2 * order / head_dim)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
