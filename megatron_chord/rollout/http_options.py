"""Options that all HTTP clients of rollout servers share."""

from __future__ import annotations

import functools
import ssl
from typing import TypedDict

import httpx


class HttpOptions(TypedDict):
    """Keyword arguments of ``httpx.Client``."""

    base_url: str
    headers: dict[str, str]
    trust_env: bool
    verify: ssl.SSLContext


def http_options(url: str, api_key: str) -> HttpOptions:
    """The address, the key, no proxy, and the certificates of this process.

    Traffic to a job's servers must not go through a cluster's HTTP proxy, so the environment is not trusted.
    """
    return HttpOptions(
        base_url=url,
        headers=authorization(api_key),
        trust_env=False,
        verify=certificates(),
    )


def authorization(api_key: str) -> dict[str, str]:
    """The header with which a request shows the server's key."""
    return {"Authorization": f"Bearer {api_key}"}


@functools.cache
def certificates() -> ssl.SSLContext:
    """The certificates that HTTPS servers are checked against.

    A client without this argument reads the file of all authorities again: 30 to 60 ms of CPU time for each server and
    step, also where the server is plain HTTP.
    """
    return httpx.create_ssl_context(trust_env=False)
