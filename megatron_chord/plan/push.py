"""Estimates the time in which new weights reach the servers, for every transport (``rollout/transports.py``)."""

from __future__ import annotations

from megatron_chord.plan.constants import CONSTANTS, Constants


def transport_of(stated: str, *, nodes: int, colocated: bool) -> str:
    """The transport of ``rollout.transport``; of ``auto``, the one that a job chooses (``cluster/job.py``)."""
    if stated != "auto":
        return stated
    if not colocated:
        return "broadcast"
    return "ipc" if nodes == 1 else "gloo"


def push_seconds(
    transport: str, model_bytes: float, *, gpus_per_node: int, constants: Constants = CONSTANTS
) -> float:
    """Seconds of one weight push.

    Args:
        model_bytes: bytes of the whole model.
        gpus_per_node: those that sample. gloo sends the whole model to each of them.
    """
    fixed, rate = {
        "ipc": constants.push_ipc,
        "broadcast": constants.push_broadcast,
        "gloo": constants.push_gloo,
        "file": constants.push_file,
    }[transport]
    copies = gpus_per_node if transport == "gloo" else 1
    return fixed + copies * model_bytes / rate
