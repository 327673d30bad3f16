"""All numbers of the planner that are measured or assumed, each with its source.

Tags in brackets are the sources of docs/planning.md. The formulas of this package use only these constants, and facts
of the model, the settings or Megatron-Core's code.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chord.costs.balance import HEAD_PASSES

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants. "Fitted" ones come from benchmarks/planner_fit.py, which sees only the rows marked fitted in
    benchmarks/planner_rows.yaml; all others come only from their sources."""

    bf16_floor: float = 1.74
    """Time of a trainer's pass in BF16 over packs of short samples (RL), divided by the time at the BF16 peak, for a
    model of unlimited width on one GPU. This constant and the next three are fitted."""
    bf16_long_floor: float = 1.25
    """The same for long packs: training on demonstrations only (mu = 1), pre-training."""
    fp8_floor: float = 1.21
    """The same in FP8, over packs of short samples. Only one fitted row uses it, so the result still depends on the
    start value of the fit: the low end of the speed-up of 1.2 to 1.5 for linear layers [MB-GUIDE]."""
    fp8_long_floor: float = 0.443
    """The same in FP8, over long packs."""
    width_cost: float = 3030.0
    """This constant divided by the hidden size is the time of operations that grow with the width and not with its
    square (norms, activation functions, quantisation), relative to the time at the peak. Fitted."""
    tensor_cost: float = 1470.0
    """This constant times (TP - 1) / hidden size is the time of tensor parallelism's communication, relative to the
    time at the peak. Fitted."""
    expert_cost: float = 20800.0
    """Time of sorting the copies of hidden states that a token sends to experts, sending them to the experts and back,
    and adding them, relative to the time at the peak: this constant times the number of copies, divided by the number
    of parameters that multiply the token. Fitted."""
    head_passes: float = HEAD_PASSES
    """Number of passes of the head, from this trainer's code. 1 for other trainers, which compute all logits once."""
    context_factor: float = 0.97
    """Factor on the efficiency for each doubling of the context axis. Assumed: no published pair of runs."""
    decode_bandwidth: float = 0.70
    """Share of the memory's bandwidth that a decode step reaches. Chosen by [RL-959]."""
    decode_flops: float = 0.5
    """Share of the peak that products of many sequences reach in decoding and prefill. Chosen by [RL-959]."""
    decode_step_s: float = 0.00602
    """Seconds of every decode step in addition to the model's work: scheduling, sampling, launches. Fitted."""
    decode_all_reduce_s: float = 30e-6
    """Seconds of one all-reduce in a decode step under tensor parallelism; two per layer. Chosen by [RL-959]."""
    decode_all_reduce_apart_s: float = 7.45e-05
    """The same if a server's GPUs are on several nodes. Fitted."""
    push_ipc: tuple[float, float] = (3.84, 13.9e9)
    """A weight push over CUDA IPC: fixed seconds, and bytes of the model per second. They are the two numbers that give
    5 s for 16.06 GB (8B) and 14 s for 141.1 GB (70B) [RL-959]."""
    port: float = 40e9
    """Bytes per second of a GPU's 400 Gb/s port between nodes [RL-BWCALC]."""
    push_broadcast: tuple[float, float] = (0.5, 40e9)
    """A push over NCCL, by one sender over a 400 Gb/s port: fixed seconds, and bytes per second [RL-BWCALC]."""

    @property
    def push_relay(self) -> tuple[float, float]:
        """A push by NCCL to one rank of each node and from there by CUDA IPC: fixed seconds, and bytes per second. A
        bucket is sent while the servers load the one before it, so the slower of the two counts. Assumed: no published
        times, not measured on GPUs."""
        fixed = self.push_broadcast[0] + self.push_ipc[0]
        return fixed, min(self.push_broadcast[1], self.push_ipc[1])

    push_gloo: tuple[float, float] = (2.0, 0.72e9)
    """A push over gloo and TCP: fixed seconds, and bytes per second that enter a node. Every GPU of a server receives
    the whole model. 26 minutes for the 1.13 TB of a node with 8 GPUs and a 70B model, from the rate measured on two
    CPU cores."""
    push_file: tuple[float, float] = (0.1, 0.82e9)
    """A push through files in shared memory: benchmarks/results/sync-2026-11-21.txt."""
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
    peer_context_bytes: float = 0.5e9
    """Reserve on a trainer's GPU from which servers on other GPUs read weights by CUDA IPC: one CUDA context, of 0.3 to
    0.5 GB. Workers map the memory into their own contexts (``rollout.transports``), so none is expected; not measured
    yet."""
    host_process_bytes: float = 5e9
    """Main memory of one rank, or of one GPU of a server, without the parts that are counted separately. Assumed."""
    asleep_bytes: float = 3e9
    """Memory that a vLLM process keeps on its GPU while it sleeps: context, CUDA graphs, NCCL's buffers."""


CONSTANTS = Constants()
