"""Reads the routes that servers keep (``rollout.route_store``). The ranks that train them read them; rank 0 reads
those that it keeps longer than a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_chord.data.packing import PackedBatch
from megatron_chord.records import Rollout
from megatron_chord.rollout.replies import RolloutError
from megatron_chord.rollout.route_reader import read_routes
from megatron_chord.routes import RemoteRoutes
from megatron_chord.runtime.parallel import ParallelGroups
from megatron_chord.sampling.context import DrawnPrompt
from megatron_chord.train.arrays import with_replaced

Updates = tuple[Sequence[PackedBatch], ...]
"""A data-parallel rank's micro-batches of each update."""


def remote_of(updates: Updates) -> list[RemoteRoutes]:
    """The routes of these micro-batches that are on servers."""
    found = [batch.routes.experts for batches in updates for batch in batches if batch.routes is not None]
    return [routes for routes in found if isinstance(routes, RemoteRoutes)]


def with_routes_here(updates: Updates, keys: Mapping[str, str], groups: ParallelGroups) -> Updates:
    """Read the routes of a data-parallel rank's micro-batches. Called on every rank.

    The first rank of each model replica reads them from the servers, and the others get them from it.

    Args:
        keys: the API key of each server, by its URL.

    Raises:
        RolloutError: on every rank, because the routes of one of them cannot be read.
    """
    remote = remote_of(updates)
    read = groups.once_per_replica(lambda: read_routes(remote, keys))

    def here(batch: PackedBatch) -> PackedBatch:
        return batch if batch.routes is None else replace(batch, routes=batch.routes.here(read))

    return tuple(tuple(map(here, batches)) for batches in updates)


def drawn_with_routes_here(drawn: Sequence[DrawnPrompt], keys: Mapping[str, str]) -> tuple[DrawnPrompt, ...]:
    """Unfinished prompts with the routes of their answers. Raises RolloutError if they cannot be read."""
    found = [rollout.routes for item in drawn for rollout in item.partial_rollouts]
    remote = [routes for routes in found if isinstance(routes, RemoteRoutes)]
    if not remote:
        return tuple(drawn)
    read = read_routes(remote, keys)

    def here(rollout: Rollout) -> Rollout:
        routes = rollout.routes
        return replace(rollout, routes=routes.here(read)) if isinstance(routes, RemoteRoutes) else rollout

    return tuple(replace(item, partial_rollouts=tuple(map(here, item.partial_rollouts))) for item in drawn)


def json_with_routes_here(value: Any, keys: Mapping[str, str]) -> Any:
    """JSON-like ``value``, in which arrays replace the routes that are on servers.

    Raises:
        RolloutError: some cannot be read.
    """
    remote = list[RemoteRoutes]()
    with_replaced(value, RemoteRoutes, remote.append)
    if not remote:
        return value
    read = read_routes(remote, keys)
    return with_replaced(value, RemoteRoutes, lambda routes: routes.here(read))


def json_with_routes_that_exist(value: Any, keys: Mapping[str, str]) -> tuple[Any, int]:
    """Like ``json_with_routes_here``, but None replaces routes that cannot be read. Also returns the number of
    these."""
    lost = 0

    def here(routes: RemoteRoutes) -> Any:
        nonlocal lost
        try:
            return routes.here(read_routes([routes], keys))
        except RolloutError:
            lost += 1
            return None

    try:
        return json_with_routes_here(value, keys), 0
    except RolloutError:
        return with_replaced(value, RemoteRoutes, here), lost
