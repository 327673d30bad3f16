"""Routes: the experts that a model's routers choose for each token. Those of rollouts may be kept on a rollout server.

A server that keeps the routes of an answer replies with a reference (``KeptRoutes``). Rank 0 plans with references, and
the ranks that train the answer read the routes from the server. So routes do not pass through rank 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RouteShape:
    """The shape of a model's routes, which are the experts that its routers choose for each token."""

    layers: int
    """Number of the model's layers, including those without experts."""
    experts: int
    chosen: int
    """Number of experts of each token, in each layer."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers without experts. Their routes have no meaning."""
    is_required: bool = False
    """True if a rollout without routes is an error."""

    def check(self, routes: np.ndarray, num_tokens: int) -> None:
        """Raise ValueError if these are not the routes of ``num_tokens`` tokens."""
        wanted = (num_tokens, self.layers, self.chosen)
        if routes.shape != wanted or routes.dtype.name not in ("uint8", "uint16"):
            raise ValueError(f"routes of shape {routes.shape} and type {routes.dtype} instead of {wanted}")
        sparse = np.delete(routes, self.dense_layers, axis=1) if self.dense_layers else routes
        # Compared by column, which is 50 times faster than to sort the experts of each token.
        columns = np.ascontiguousarray(np.moveaxis(sparse, -1, 0))
        if columns.size and columns.max() >= self.experts:
            raise ValueError(f"routes to expert {columns.max()} of {self.experts}")
        if any((first == second).any() for first, second in itertools.combinations(columns, 2)):
            raise ValueError("routes with the same expert twice for one token")


@dataclass(frozen=True, kw_only=True)
class KeptRoutes:
    """A reference to the routes of one answer in the memory of a rollout server."""

    url: str
    """The server's address."""
    store: str
    """Random name of the server's memory. A server that was restarted has another one."""
    key: str
    """Random name of the routes in it."""
    num_tokens: int
    dtype: str
    """uint8 or uint16."""
    checksum: int
    """CRC-32 of the bytes."""
    shape: RouteShape

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.shape.layers * self.shape.chosen * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class RoutePiece:
    """Rows ``start`` to ``stop`` (not included) of routes that are in memory or on a server."""

    source: KeptRoutes | np.ndarray
    start: int
    stop: int

    def rows(self, read: dict[str, np.ndarray]) -> np.ndarray:
        """Return the rows. ``read`` has, by key, the routes that were read from servers."""
        whole = read[self.source.key] if isinstance(self.source, KeptRoutes) else self.source
        return whole[self.start : self.stop]


class RemoteRoutes:
    """Routes [R, layers, chosen] of which at least a part is on servers. Slices and ``joined`` need no data."""

    def __init__(self, pieces: Sequence[RoutePiece]) -> None:
        self.pieces = tuple(piece for piece in pieces if piece.stop > piece.start)

    @classmethod
    def of(cls, kept: KeptRoutes) -> RemoteRoutes:
        return cls([RoutePiece(source=kept, start=0, stop=kept.num_tokens)])

    def __len__(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def __getitem__(self, rows: slice) -> RemoteRoutes:
        start, stop, step = rows.indices(len(self))
        assert step == 1
        found, first = list[RoutePiece](), 0
        for piece in self.pieces:
            shift = piece.start - first
            first += piece.stop - piece.start
            low, high = max(start + shift, piece.start), min(stop + shift, piece.stop)
            found.append(RoutePiece(source=piece.source, start=low, stop=max(low, high)))
        return RemoteRoutes(found)

    def kept(self) -> list[KeptRoutes]:
        """The references to the parts that are on servers."""
        return [piece.source for piece in self.pieces if isinstance(piece.source, KeptRoutes)]

    def here(self, read: dict[str, np.ndarray]) -> np.ndarray:
        """Return the routes as one array, of at least one row. ``read`` has, by key, those that were read from
        servers."""
        return np.concatenate([piece.rows(read) for piece in self.pieces])


Routes = np.ndarray | RemoteRoutes


def joined(parts: Sequence[Routes]) -> Routes:
    """The rows of all parts, one part after another. There is at least one part."""
    if not any(isinstance(part, RemoteRoutes) for part in parts):
        return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    return RemoteRoutes(
        [
            piece
            for part in parts
            for piece in (
                part.pieces
                if isinstance(part, RemoteRoutes)
                else (RoutePiece(source=part, start=0, stop=len(part)),)
            )
        ]
    )
