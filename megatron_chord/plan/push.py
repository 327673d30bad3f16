"""Estimates the time in which new weights reach the servers, for every transport (``rollout/transports.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_chord.plan.constants import CONSTANTS, Constants

if TYPE_CHECKING:
    from megatron_chord.rollout.sync import TransportName


def job_transport(*, nodes: int, colocated: bool) -> TransportName:
    """The transport that a job of ``nodes`` with GPUs chooses. ``colocated``: servers run beside the ranks."""
    if not colocated:
        return "broadcast"
    # CUDA IPC works only within a node, and NCCL does not allow a rank and a server's worker on one GPU.
    return "ipc" if nodes == 1 else "relay"


def push_seconds(
    transport: TransportName, model_bytes: float, *, gpus_per_node: int, constants: Constants = CONSTANTS
) -> float:
    """Seconds of one weight push.

    Args:
        model_bytes: bytes of the whole model.
        gpus_per_node: those that sample. gloo sends the whole model to each of them.
    """
    fixed, rate = {
        "relay": constants.push_relay,
        "ipc": constants.push_ipc,
        "broadcast": constants.push_broadcast,
        "gloo": constants.push_gloo,
        "file": constants.push_file,
    }[transport]
    copies = gpus_per_node if transport == "gloo" else 1
    return fixed + copies * model_bytes / rate
