"""RoPE's frequencies for contexts longer than the model was first trained on.

Megatron-Core 0.16.1 has Llama 3's scaling with fixed constants (low 1, high 4, 8192 positions;
models/common/embeddings/rotary_pos_embedding.py:92) and spells linear scaling as fractional positions. Here the
frequencies themselves are what Transformers 5 computes (modeling_rope_utils.py), bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_chord.families.shape import LinearScaling, Llama3Scaling


def scaled_frequencies(frequencies: Tensor, scaling: LinearScaling | Llama3Scaling) -> Tensor:
    """[head_dim / 2] -> the same, scaled."""
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    long = wavelength > scaling.original_max_positions / low
    short = wavelength < scaling.original_max_positions / high
    slowed = torch.where(long, frequencies / scaling.factor, frequencies)
    share = (scaling.original_max_positions / wavelength - low) / (high - low)
    between = (1 - share) * slowed / scaling.factor + share * slowed
    return torch.where(~short & ~long, between, slowed)
