"""Mixtral (Transformers' modeling_mixtral.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chord.families.dense import decoder
from megatron_chord.families.moe import Names, mixture
from megatron_chord.families.settings import read_rope, refuse_short_window
from megatron_chord.families.shape import Experts, ModelShape, required_value


def shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_short_window(config, default=None)
    feed_forward = mixture(
        config,
        experts=Experts(count=required_value(config, "num_local_experts")),
        width=required_value(config, "intermediate_size"),
        normalised=True,
        names=Names(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )
    return decoder(config, rope=read_rope(config, default_base=1e6), feed_forward=feed_forward)
