"""The sizes of published models, from their config.json files in configs/, and the cluster examples that train them."""

from __future__ import annotations

from pathlib import Path

from megatron_chord.families.shape import ModelShape
from megatron_chord.families.table import read_shape

CONFIGS = Path(__file__).with_name("configs")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
CLUSTER_RUNS = {
    "chord_qwen7b": ("qwen2.5-7b", 1),
    "chord_qwen32b": ("qwen2.5-32b", 4),
    "chord_llama70b": ("llama-3.1-70b", 8),
    "chord_qwen72b": ("qwen2.5-72b", 8),
    "chord_qwen3_30b_a3b": ("qwen3-30b-a3b", 4),
}
"""For each run: its model, and its number of nodes with 8 H100."""
ROLLOUT_NODES = {
    "chord_qwen7b": 0,
    "chord_qwen32b": 1,
    "chord_llama70b": 2,
    "chord_qwen72b": 2,
    "chord_qwen3_30b_a3b": 1,
}
"""How many of these nodes only sample."""


def shared(name: str) -> tuple[str, ...]:
    """Settings with which every node of the run trains and samples."""
    if not ROLLOUT_NODES[name]:
        return ()
    share = 0.38 if name == "chord_qwen72b" else 0.4
    return f"parallel.ranks={8 * CLUSTER_RUNS[name][1]}", f"rollout.gpu_memory_utilization={share}"


def shape_of(name: str) -> ModelShape:
    return read_shape(CONFIGS / name)
