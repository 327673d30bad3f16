"""Sizes of real models, as their config.json states them, with as many layers as a benchmark can hold."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # Qwen2.5-7B
    "7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    # Llama-3-70B
    "70b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""The sizes that a rehearsal on a CPU uses instead."""


def model_config(name: str, *, layers: int | None = None, tiny: bool = False) -> dict[str, Any]:
    """Return a config.json of the shape. ``layers`` replaces its number of layers, and ``tiny`` replaces its sizes."""
    config = SHAPES[name] | (TINY if tiny else {})
    return config if layers is None else config | {"num_hidden_layers": layers}
