"""Decides if a run replays the routes of the rollout servers (``rollout.router_replay``), and gives the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_chord.config import RunConfig
from megatron_chord.families.shape import ModelShape
from megatron_chord.rollout.server import why_no_routes
from megatron_chord.routes import RouteShape

_OVERRIDES = {
    "moe_router_fusion": "the fused router chooses experts inside of its kernel",
    "moe_expert_capacity_factor": "experts would drop tokens that the servers did not drop",
}
"""Settings of Megatron with which routes cannot be replayed."""


@dataclass(frozen=True, kw_only=True)
class RouterReplayChoice:
    is_on: bool
    text: str
    """A message for the user: what happens, and why."""

    def __str__(self) -> str:
        return self.text


def router_replay(run: RunConfig, shape: ModelShape) -> RouterReplayChoice:
    """The decision for this run. It is equal on every rank and for every server of a job.

    Raises:
        ValueError: ``rollout.router_replay`` is true, but the run cannot do it.
    """
    wanted, reason = run.rollout.router_replay, _why_not(run, shape)
    if wanted and reason is not None:
        raise ValueError(f"rollout.router_replay is true, but {reason}")
    if wanted is False:
        return _off("rollout.router_replay is false")
    if reason is not None:
        return _off(reason)
    return RouterReplayChoice(
        is_on=True,
        text="tokens of rollouts pass through the experts that the servers chose (rollout.router_replay)",
    )


def wanted_routes(run: RunConfig, shape: ModelShape) -> RouteShape | None:
    """The shape of the rollouts' routes; None without router replay."""
    if shape.routes is None or not router_replay(run, shape).is_on:
        return None
    return replace(shape.routes, is_required=run.rollout.router_replay is True)


def _off(reason: str) -> RouterReplayChoice:
    return RouterReplayChoice(
        is_on=False, text=f"the trainer's routers choose the experts of rollout tokens, too: {reason}"
    )


def _why_not(run: RunConfig, shape: ModelShape) -> str | None:
    """The reason why the run cannot replay routes; None if it can."""
    if shape.experts is None:
        return f"{shape.family} has no experts"
    for name, why in _OVERRIDES.items():
        if run.model.megatron_overrides.get(name):
            return f"model.megatron_overrides sets {name}: {why}"
    if run.rollout.servers:
        return None  # the first reply shows whether they return routes
    return why_no_routes(on_cpu=not torch.cuda.is_available())
