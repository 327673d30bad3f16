"""Router replay: the routers of the policy choose for rollout tokens the experts that the rollout engine chose.

Trainer and engine round differently, so that near ties of router scores are decided differently, and the log-probs of
the same token differ much more than by rounding (R3, arXiv 2510.11370). Only the choice is replayed. The weights of the
experts come from the router's own scores, so the router is trained.

Megatron calls ``get_replay_topk`` of a router's ``router_replay`` instead of its top-k (transformer/moe/moe_utils.py;
0.16.1: 705, 0.19.2: 831). Its own class there has one action for all micro-batches, no mask, no check, and a registry
that a reference policy joins. So ``RouterReplay`` takes its place, one for each router, without a registry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DeviceRoutes:
    """The experts of the F tokens of a micro-batch that this rank's routers see and that the engine routed."""

    positions: Tensor
    """[F] int64: their places among the tokens that the routers see"""
    experts: Mapping[int, Tensor]
    """Experts of these tokens, by the number of the layer: [F, k] uint8 or uint16 each"""


class RouterReplay:
    """Chooses the experts of one router: those given for some tokens, and the router's own choice for the others.

    A router that is computed again in the backward pass (``model.recompute``) must choose the same experts again. The
    backward passes of a chunk's micro-batches come in the order of their forward passes, in every pipeline schedule. So
    the rows of each forward pass wait in a queue.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        """Number of the layer in the whole model; the first is 0."""
        self._has_backward = False
        self._current: tuple[Tensor, Tensor] | None = None
        self._waiting: deque[tuple[Tensor, Tensor] | None] = deque()
        self._num_given = 0
        self._replayed: tuple[int, Tensor] | None = None
        """For the last forward pass: number of replayed tokens, and number of those that the router would route
        otherwise."""
        self._counts: Tensor | None = None

    def begin(self, *, has_backward: bool) -> None:
        """Prepare for a pass over micro-batches. Without a backward pass no routes are kept for it."""
        self._has_backward = has_backward
        self._current, self._num_given = None, 0
        self._waiting.clear()

    def give(self, routes: DeviceRoutes | None) -> None:
        """Set the routes of the micro-batch whose forward pass comes next; None: the router chooses for all tokens."""
        self._current = None if routes is None else (routes.positions, routes.experts[self.layer])
        self._num_given += 1
        if self._has_backward:
            self._waiting.append(self._current)

    def check(self) -> None:
        """Raise RuntimeError if the router was computed again for some of the micro-batches but not for others."""
        if self._waiting and len(self._waiting) != self._num_given:
            raise RuntimeError(
                f"router replay: layer {self.layer} was computed again for "
                f"{self._num_given - len(self._waiting)} of {self._num_given} micro-batches, so routes may have been "
                "replayed for a wrong one"
            )
        self._waiting.clear()
        self._current = None

    def take_counts(self) -> Tensor | None:
        """[experts + 3] int64: counts over the passes with a backward pass since the last call; None without any.

        Tokens of each expert; choices of an expert that were dropped (Megatron's capacity); replayed tokens; replayed
        tokens for which the router itself would choose at least one other expert.
        """
        counts, self._counts = self._counts, None
        return counts

    def note(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        """Count the choices. This is a forward hook of the router, whose output is weights and choices [N, experts] of
        all tokens."""
        replayed, self._replayed = self._replayed, None
        if not self._has_backward or _is_recomputed():
            return
        tokens = output[1].sum(0)
        rest = tokens.new_zeros(3)
        rest[0] = len(output[1]) * router.topk - tokens.sum()
        if replayed is not None:
            rest[1], rest[2] = replayed
        counts = torch.cat([tokens, rest])
        self._counts = counts if self._counts is None else self._counts + counts

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores [N, k] and numbers [N, k] of the chosen experts, out of ``scores`` [N, experts].

        ``default_compute_topk`` is the router's own choice. The names are Megatron's.
        """
        assert default_compute_topk is not None
        own, chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        given = self._waiting.popleft() if _is_recomputed() else self._current
        if given is None:
            return own, chosen
        positions, experts = given
        if experts.shape != (len(positions), topk):
            raise RuntimeError(
                f"router replay: layer {self.layer} got routes of shape {tuple(experts.shape)} for "
                f"{len(positions)} tokens with {topk} experts each"
            )
        experts = experts.to(chosen.dtype)
        differs = chosen[positions].sort(-1).values != experts.sort(-1).values
        self._replayed = len(positions), differs.any(-1).sum()
        chosen = chosen.index_copy(0, positions, experts)
        return scores.gather(1, chosen), chosen


def install_replay(chunks: Sequence[Any]) -> None:
    """Give every router of these model chunks (not wrapped) a ``RouterReplay``. Without routes it changes nothing."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            router = getattr(layer.mlp, "router", None)
            if router is not None:
                router.router_replay = RouterReplay(layer.layer_number - 1)
                router.register_forward_hook(router.router_replay.note)


def replays_of(chunk: Any) -> list[RouterReplay]:
    """The ``RouterReplay`` of every router of a chunk; empty for a dense model and for a reference policy."""
    routers = [getattr(layer.mlp, "router", None) for layer in chunk.decoder.layers]
    replays = [getattr(router, "router_replay", None) for router in routers]
    return [replay for replay in replays if isinstance(replay, RouterReplay)]


def routed_layers(chunks: Sequence[Any]) -> list[int]:
    """Numbers of the layers of these chunks that have a ``RouterReplay``."""
    return [replay.layer for chunk in chunks for replay in replays_of(chunk)]


def begin_replay(chunks: Sequence[Any], *, has_backward: bool) -> None:
    """Call before the micro-batches of a pass. ``has_backward``: whether backward passes follow."""
    for chunk in chunks:
        for replay in replays_of(chunk):
            replay.begin(has_backward=has_backward)


def give_routes(chunk: Any, routes: DeviceRoutes | None) -> None:
    """Call before the forward pass of each micro-batch. Nothing happens without a ``RouterReplay``."""
    for replay in replays_of(chunk):
        replay.give(routes)


def check_replayed(chunks: Sequence[Any]) -> None:
    """Call after the micro-batches of a pass. Raises RuntimeError if a router has mixed up micro-batches."""
    for chunk in chunks:
        for replay in replays_of(chunk):
            replay.check()


def _is_recomputed() -> bool:
    """True if this code runs inside of a backward pass, which computes a forward pass again."""
    return torch._C._current_graph_task_id() != -1
