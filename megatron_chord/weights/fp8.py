"""Block-quantised FP8 weights as vLLM and Transformers load them: E4M3 numbers and one fp32 scale for each block.

The format is that of DeepSeek-V3's published weights: ``W.weight`` in ``float8_e4m3fn`` and ``W.weight_scale_inv`` in
fp32. In each 128 x 128 block ``weight ~= fp8 * scale_inv`` (vLLM's ``Fp8Config.weight_block_size``; Transformers'
``FineGrainedFP8Config``). The engine quantises activations at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_chord.weights.mapping import Entry

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 numbers [rows, columns] and their fp32 scales [ceil(rows / 128), ceil(columns / 128)].

    A block's scale is its largest absolute value / 448 (the largest E4M3 number), computed in fp32. It is 1 for a block
    of zeros.

    Raises:
        ValueError: the weight has an infinity or a NaN.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    magnitude = blocks.abs().amax(dim=(1, 3))
    if not magnitude.isfinite().all():
        raise ValueError("the weight has numbers that are not finite")
    scale = torch.where(magnitude > 0, magnitude / largest, 1.0)
    scaled = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def is_quantised(entry: Entry, shape: Sequence[int]) -> bool:
    """True if a parameter is quantised: matrices of linear layers are; embeddings, the head, norms, biases, routers and
    gates are not."""
    rule = entry.rule
    return len(shape) == 2 and not rule.vocab and (rule.of_expert or rule.transform.axis is not None)


def quantization_config(kept: Sequence[str]) -> dict[str, Any]:
    """config.json's ``quantization_config``. ``kept`` are the modules whose matrices were not quantised."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(kept),
    }
