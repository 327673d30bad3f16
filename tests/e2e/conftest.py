"""One vLLM server for the tests whose runs bring their own weights to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from tests.support.ranks import ROOT


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    started = start_server(
        ROOT / "examples" / "arithmetic" / "policy",
        ServerSettings(dtype="fp32", max_model_len=160, kv_cache_bytes=64 << 20),
        log=tmp_path_factory.mktemp("server") / "vllm.log",
    )
    try:
        started.wait_until_ready(300)
        yield started
    finally:
        started.stop()


@pytest.fixture
def server_key(server: RolloutServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", server.api_key)
