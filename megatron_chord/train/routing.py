"""Metrics of a mixture of experts: how evenly tokens are spread, how many are dropped, how many routes are replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_chord.model.forward import unwrapped
from megatron_chord.model.replay import replays_of
from megatron_chord.train.state import TrainState


def take_routing(state: TrainState) -> dict[str, Any]:
    """The metrics of all training passes since the last call, over all tokens of all ranks; equal on every rank.

    Tokens are those that pass through the model: prompts, answers, demonstrations and padding. Empty for a dense model.
    Collectives: for a mixture of experts one all-reduce over all ranks.
    """
    shape = state.shape
    if shape.experts is None:
        return {}
    counts = torch.zeros(
        shape.num_layers, shape.experts.count + 3, dtype=torch.int64, device=state.groups.device
    )
    for replay in (replay for chunk in state.chunks for replay in replays_of(unwrapped(chunk))):
        found = replay.take_counts()
        if found is not None:
            counts[replay.layer] += found
    dist.all_reduce(counts)
    routes = shape.routes
    assert routes is not None
    rows = {n: row for n, row in enumerate(counts.tolist()) if n not in routes.dense_layers}
    return routing_metrics(rows, chosen=routes.chosen)


def routing_metrics(counts: Mapping[int, Sequence[int]], *, chosen: int) -> dict[str, Any]:
    """The metrics from the counts of each layer (``RouterReplay.take_counts``).

    ``imbalance`` is the number of tokens of the expert with the most tokens divided by the mean of all experts; in
    ``routing`` it is that of the worst layer. The others are shares over all layers: ``dropped`` is the share of the
    choices of an expert that are dropped. ``replayed`` is the share of the tokens that are replayed. ``otherwise`` is
    the share of the replayed tokens that the router itself would route otherwise; it is missing without replayed
    tokens.

    Args:
        chosen: number of experts of each token.
    """
    layers = {str(layer): _Layer.of(row) for layer, row in counts.items() if any(row)}
    if not layers:
        return {}
    choices = sum(layer.choices for layer in layers.values())
    replayed = sum(layer.replayed for layer in layers.values())
    imbalance = {name: layer.imbalance for name, layer in layers.items()}
    found: dict[str, float] = {
        "imbalance": max(imbalance.values()),
        "dropped": sum(layer.dropped for layer in layers.values()) / choices,
        "replayed": replayed * chosen / choices,
    }
    by_layer = {
        "imbalance": imbalance,
        "dropped": {name: layer.dropped / layer.choices for name, layer in layers.items()},
    }
    if replayed:
        found["otherwise"] = sum(layer.otherwise for layer in layers.values()) / replayed
        by_layer["otherwise"] = {
            name: layer.otherwise / max(layer.replayed, 1) for name, layer in layers.items()
        }
    return {"routing": found, "routing_by_layer": by_layer}


@dataclass(frozen=True, kw_only=True)
class _Layer:
    choices: int
    dropped: int
    replayed: int
    otherwise: int
    imbalance: float

    @classmethod
    def of(cls, row: Sequence[int]) -> _Layer:
        *tokens, dropped, replayed, otherwise = row
        return cls(
            choices=sum(tokens) + dropped,
            dropped=dropped,
            replayed=replayed,
            otherwise=otherwise,
            imbalance=max(tokens) * len(tokens) / max(sum(tokens), 1),
        )
