"""HTTP clients of rollout servers check certificates, and read those of the authorities once per process."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import pytest

from megatron_chord.rollout import http_options
from megatron_chord.rollout.client import RolloutClient


def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run makes a client for each server in each step."""
    calls: list[Any] = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: calls.append(a) or create(*a, **k))
    http_options._certificates.cache_clear()
    for port in range(1, 4):
        with contextlib.closing(RolloutClient(f"https://127.0.0.1:{port}", "key")) as client:
            for _ in range(2):
                client._async_http()
    assert len(calls) == 1


def test_certificates_are_checked() -> None:
    verify = http_options.http_options("https://node", "key")["verify"]
    assert verify.verify_mode == ssl.CERT_REQUIRED
    assert verify.check_hostname
