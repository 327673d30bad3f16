"""Estimates the time in which new weights reach the servers, for every transport (``rollout/transports.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_chord.config import RunConfig
from megatron_chord.costs.parameters import WEIGHT_BYTES
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


def late_push(run: RunConfig, transport: TransportName, parameters: int, *, gpus_per_node: int) -> str | None:
    """The reason why a push cannot meet ``timeouts.weight_push_s``; None if it can.

    Args:
        parameters: number of elements of the whole model.
        gpus_per_node: those that sample.
    """
    size = WEIGHT_BYTES[run.model.dtype] * parameters
    seconds = push_seconds(transport, size, gpus_per_node=gpus_per_node)
    limit = run.timeouts.weight_push_s
    if seconds <= limit:
        return None
    faster = "Leave rollout.transport out, or set" if transport == "gloo" else "Set"
    settings = "timeouts.weight_push_s"
    if run.parallel.waits_in_gathers and 2 * seconds > run.timeouts.collective_s:
        settings += " and timeouts.collective_s"
    return (
        f"a push of {size / 1e9:.0f} GB of weights by the transport {transport} takes about {seconds:.0f} s, "
        f"longer than timeouts.weight_push_s ({limit:.0f} s). {faster} {settings} to {2 * seconds:.0f}"
    )
