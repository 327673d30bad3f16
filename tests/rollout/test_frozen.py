"""A stopped server is noticed while it has requests: the whole server, or its engine process alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_chord.process_table import descendants
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest, RolloutError, StaleWeights
from tests.rollout.conftest import Servers
from tests.support.listening import addresses

SILENCE_S = 4.0


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        prompt_ids=(5, 6), num_rollouts=2, seed=3, temperature=1.0, max_tokens=max_tokens, stop_token_ids=()
    )


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_progress_of_a_server_is_vllms_own_token_count(servers: Servers) -> None:
    """Two prompts of 2 tokens, each with two answers of 50: the server reads 8 tokens and samples 200."""
    server = servers.healthy()

    def num_tokens() -> float:
        async def ask() -> float | None:
            async with client._async_http() as http:
                return await client._num_tokens(http, 30)

        found = asyncio.run(ask())
        assert found is not None
        return found

    with contextlib.closing(RolloutClient(server.url, server.api_key)) as client:
        before = num_tokens()
        # The answers are refused, because weights were never pushed. The test only looks at the count of tokens.
        with pytest.raises(StaleWeights):
            client.generate([request(50)] * 2, version=0, deadline_s=300)
        # vLLM may count the last tokens a moment after the answers have come.
        deadline = time.monotonic() + 240
        while num_tokens() - before < 8 + 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert num_tokens() - before == 8 + 200


@pytest.mark.parametrize("part", ["server", "engine"])
def test_a_frozen_server_is_noticed_long_before_the_samplings_deadline(servers: Servers, part: str) -> None:
    server = servers.healthy()
    engines = [
        pid for pid in descendants(server.pid) if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert engines, "vLLM runs its engine in a process of its own"
    assert addresses(server.processes()) == {"127.0.0.1"}
    pids = engines if part == "engine" else [server.pid, *descendants(server.pid)]
    with contextlib.closing(RolloutClient(server.url, server.api_key, silence_s=SILENCE_S)) as client:
        begun = time.monotonic()
        with stopped(pids), pytest.raises(RolloutError, match=r"frozen: .* computed no token"):
            client.generate([request(400)], version=0, deadline_s=300)
        assert SILENCE_S < time.monotonic() - begun < 150
