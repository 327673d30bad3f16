"""All numbers of the planner that are measured or assumed, each with its source.

Tags in brackets are the sources of docs/planning.md. The formulas of this package use only these constants, and facts
of the model, the settings or Megatron-Core's code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants. "Calibrated" ones were fitted to the rows of that name in benchmarks/planner.py; all others come
    only from their sources."""

    train_efficiency: float = 0.42
    """Model FLOP/s of a trainer on packed sequences over the GPU's peak, before the factors below. Calibrated."""
    tensor_factor: MappingProxyType[int, float] = field(
        default_factory=lambda: MappingProxyType({1: 1.0, 2: 0.96, 4: 0.88, 8: 0.65})
    )
    """Factor on the efficiency under tensor parallelism. 8: 704 -> 509 TFLOP/s from TP4 PP4 to TP8 PP4 [MB-SKILL-MEM].
    The others calibrated."""
    pipeline_factor: float = 0.954
    """Factor on the efficiency for each doubling of the pipeline's stages, in addition to the bubble: 704 -> 668
    TFLOP/s from TP4 PP4 DP2 to TP4 PP8 DP1, of which the bubbles of 16 and 32 micro-batches in 5 chunks explain 0.6 %
    [MB-SKILL-MEM]."""
    context_factor: float = 0.97
    """Factor on the efficiency for each doubling of the context axis. Assumed: no published pair of runs."""
    moe_factor: float = 0.274
    """Factor on the efficiency for a mixture of small experts: Qwen3-30B-A3B's 204 over Llama3-8B's 744 TFLOP/s per
    GPU, both FP8 pre-training [MB-ARCH]."""
    fp8_factor: float = 1.2
    """Speed-up of training in FP8: the low end of 1.2 to 1.5 for linear layers [MB-GUIDE]."""
    decode_bandwidth: float = 0.70
    """Share of the memory's bandwidth that a decode step reaches. Calibrated."""
    decode_flops: float = 0.5
    """Share of the peak that products of many sequences reach in decoding and prefill. Calibrated."""
    decode_step_s: float = 6e-3
    """Seconds of every decode step in addition to the model's work: scheduling, sampling, launches. Calibrated."""
    decode_all_reduce_s: float = 30e-6
    """Seconds of one all-reduce in a decode step under tensor parallelism; there are two per layer. Calibrated."""
    sync_shared: tuple[float, float] = (2.0, 10e9)
    """A weight push to servers on the same GPUs: fixed seconds, and bytes per second. Calibrated on 5 s (8B) and 14 s
    (70B) [RL-959]."""
    sync_apart: tuple[float, float] = (0.5, 40e9)
    """A push to other GPUs, by one sender over a 400 Gb/s port: fixed seconds, and bytes per second [RL-BWCALC]."""
    host_copy: float = 20e9
    """Bytes per second between a GPU and pinned main memory, all GPUs of a node at the same time. Assumed: a PCIe 5
    x16 port can do 64e9 alone."""
    step_overhead: float = 0.03
    """Share of a step in addition to its phases: drawing, grading, packing, logging. 2 to 4 % in [RL-959]."""
    cuda_bytes: float = 3e9
    """Memory of a training process in addition to torch's tensors: CUDA context, work spaces of cuBLAS and cuDNN,
    NCCL's buffers. 3 to 5 GB remain when everything else is released [SLIME-010]."""
    fragmentation: float = 0.05
    """Additional share of activations and of the head's work space."""
    server_bytes: float = 3e9
    """Memory of a vLLM process in addition to weights and KV cache: context, CUDA graphs, activations of prefill."""
    asleep_bytes: float = 3e9
    """Memory that a vLLM process keeps on its GPU while it sleeps: context, CUDA graphs, NCCL's buffers."""


CONSTANTS = Constants()
