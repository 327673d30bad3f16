"""The server's side of routes: vLLM's API server keeps them in main memory, and ranks read them from it.

A request of the trainer says by a header what happens to its routes: they are kept for a step, so that the reply has
references to them, or they are left out. Without the header, or if the memory is full, the reply brings the routes
themselves, as vLLM sends them. ``rollout.route_reader`` is the other side.

    POST /megatron_chord/routes           {"keys": [...]} -> their bytes, one after another; 404 if one is not there
    POST /megatron_chord/routes/release   {"through": step, or null for all} -> frees the routes of steps up to this one
    GET  /megatron_chord/routes           -> {"store": its name, "num_bytes": ..., "max_bytes": ...}
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import numpy as np

from megatron_chord.rollout.auth import RequireKey

HEADER = "megatron-chord-routes"
"""A request's header: the number of the step for which routes are kept, or ``LEFT_OUT``."""
LEFT_OUT = "left out"
PATH = "/megatron_chord/routes"
RELEASE = f"{PATH}/release"
REFERENCE = b"routes kept: "
"""Beginning of a reference, in place of an .npy file. JSON follows."""
MEMORY_VARIABLE = "MEGATRON_CHORD_ROUTES_BYTES"
"""Environment variable of a server: maximum number of bytes of routes that it keeps."""
_MEMORY_BYTES = 4 << 30
_MAX_BODY_BYTES = 16 << 20

_routes_header: ContextVar[str | None] = ContextVar("routes_header", default=None)
"""The header's value of the request that is being answered."""

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class RouteStore:
    """Routes in main memory, by key. Used by one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.name = secrets.token_hex(8)
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[str, tuple[int, bytes]] = {}
        """(step, bytes) by key."""

    def keep(self, routes: np.ndarray, step: int) -> bytes | None:
        """Keep a copy of the routes, and return a reference to it; None if there is no memory left."""
        if self.num_bytes + routes.nbytes > self.max_bytes:
            return None
        key, content = secrets.token_urlsafe(16), routes.tobytes()
        self._kept[key] = step, content
        self.num_bytes += len(content)
        reference = {
            "store": self.name,
            "key": key,
            "shape": routes.shape,
            "dtype": routes.dtype.name,
            "checksum": zlib.crc32(content),
        }
        return REFERENCE + json.dumps(reference).encode()

    def read(self, keys: list[str]) -> list[bytes]:
        """The routes. Raises KeyError if some are not there."""
        return [self._kept[key][1] for key in keys]

    def release(self, through: int | None) -> None:
        """Free the routes of all steps up to ``through``; None: of all steps."""
        for key, (step, content) in list(self._kept.items()):
            if through is None or step <= through:
                del self._kept[key]
                self.num_bytes -= len(content)


class KeepRoutes:
    """ASGI middleware of the rollout server. The paths of its own need the run's key, whatever comes before it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._own = RequireKey(self._answer)
        self._store = RouteStore(int(os.environ.get(MEMORY_VARIABLE, _MEMORY_BYTES)))
        _encode_by(self._store)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in (PATH, RELEASE):
            await self._own(scope, receive, send)
            return
        if scope["type"] == "http":
            value = dict(scope.get("headers", ())).get(HEADER.encode())
            _routes_header.set(None if value is None else value.decode("latin-1"))
        await self._app(scope, receive, send)

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "GET" and scope["path"] == PATH:
                store = self._store
                content = [
                    json.dumps(
                        {
                            "store": store.name,
                            "num_bytes": store.num_bytes,
                            "max_bytes": store.max_bytes,
                        }
                    ).encode()
                ]
            elif scope["method"] != "POST":
                await _reply(send, 405, [b""])
                return
            elif scope["path"] == RELEASE:
                through = json.loads(await _body(receive))["through"]
                self._store.release(None if through is None else int(through))
                content = [b"{}"]
            else:
                content = self._store.read(json.loads(await _body(receive))["keys"])
        except (ValueError, TypeError, KeyError) as error:
            missing = isinstance(error, KeyError)
            await _reply(send, 404 if missing else 400, [f"no routes: {error!r}"[:200].encode()])
            return
        await _reply(send, 200, content)


def _encode_by(store: RouteStore) -> None:
    """Make vLLM's reply to /inference/v1/generate contain what the request's header asks for."""
    import pybase64
    from vllm.entrypoints.scale_out.token_in_token_out import serving

    module: Any = serving
    usual = module.numpy2base64

    def encoded(routes: np.ndarray) -> str | None:
        value = _routes_header.get()
        if value == LEFT_OUT:
            return None
        reference = store.keep(routes, int(value)) if value is not None and value.isdecimal() else None
        return usual(routes) if reference is None else pybase64.b64encode(reference).decode("ascii")

    module.numpy2base64 = encoded


async def _body(receive: Receive) -> bytes:
    content = b""
    while True:
        part = await receive()
        if part["type"] != "http.request":
            raise ValueError("the client has gone")
        content += part.get("body", b"")
        if len(content) > _MAX_BODY_BYTES:
            raise ValueError(f"a request of more than {_MAX_BODY_BYTES} bytes")
        if not part.get("more_body", False):
            return content


async def _reply(send: Send, status: int, parts: list[bytes]) -> None:
    length = str(sum(map(len, parts))).encode()
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
