"""Reads routes from the rollout servers that keep them (``rollout.route_store``), and checks them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np

from megatron_chord.rollout.http_options import http_options
from megatron_chord.rollout.replies import RolloutError
from megatron_chord.rollout.route_store import PATH
from megatron_chord.routes import KeptRoutes, RemoteRoutes

_BATCH_BYTES = 64 << 20
_CONNECTIONS = 8
"""Number of requests at the same time."""
_TIMEOUT_S = 60.0
"""Seconds without a byte after which a server counts as lost."""


def read_routes(remote: Iterable[RemoteRoutes], keys: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The routes [tokens, layers, chosen] that servers keep for ``remote``, by their key. Each is read once.

    Args:
        keys: the API key of each server, by its URL.

    Raises:
        RolloutError: a server does not answer, does not have them any more, or they are not valid.
    """
    wanted = {kept.key: kept for routes in remote for kept in routes.kept()}
    batches = list(_batches(wanted.values()))
    if not batches:
        return {}
    with ThreadPoolExecutor(min(_CONNECTIONS, len(batches))) as pool:
        return {
            key: routes
            for found in pool.map(lambda batch: _read(batch, keys), batches)
            for key, routes in found
        }


def _batches(wanted: Iterable[KeptRoutes]) -> Iterator[list[KeptRoutes]]:
    """Split into requests to one server each, of limited size."""
    by_url: dict[str, list[KeptRoutes]] = {}
    for kept in wanted:
        by_url.setdefault(kept.url, []).append(kept)
    for group in by_url.values():
        batch, size = list[KeptRoutes](), 0
        for kept in group:
            if batch and size + kept.num_bytes > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(kept)
            size += kept.num_bytes
        yield batch


def _read(batch: Sequence[KeptRoutes], keys: Mapping[str, str]) -> list[tuple[str, np.ndarray]]:
    url = batch[0].url
    where = f"routes of {len(batch)} answers from {url}"
    if url not in keys:
        raise RolloutError(f"{where}: the server was replaced")
    try:
        with httpx.Client(**http_options(url, keys[url]), timeout=_TIMEOUT_S) as http:
            response = http.post(PATH, json={"keys": [kept.key for kept in batch]})
    except httpx.TransportError as error:
        raise RolloutError(f"{where}: {type(error).__name__} {error}") from error
    if response.status_code != 200:
        raise RolloutError(f"{where}: HTTP {response.status_code}: {response.text[:200]}")
    content, start = response.content, 0
    if len(content) != sum(kept.num_bytes for kept in batch):
        raise RolloutError(f"{where}: {len(content)} bytes instead of {sum(k.num_bytes for k in batch)}")
    found = list[tuple[str, np.ndarray]]()
    for kept in batch:
        own = content[start : start + kept.num_bytes]
        start += kept.num_bytes
        if zlib.crc32(own) != kept.checksum:
            raise RolloutError(f"{where}: the checksum of {kept.key} is wrong")
        routes = np.frombuffer(own, kept.dtype).reshape(-1, kept.shape.layers, kept.shape.chosen)
        try:
            kept.shape.check(routes, kept.num_tokens)
        except ValueError as error:
            raise RolloutError(f"{where}: {error}") from error
        found.append((kept.key, routes))
    return found
