"""On a repeatable server a rollout's log-probs do not depend on the other requests of the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from tests.support.ranks import ROOT

NUM_REQUESTS = 8


def sample(server: RolloutServer, index: int) -> list[Any]:
    """Return (token ids, log-probs) of four answers to a prompt that only this index has."""
    reply = httpx.post(
        f"{server.url}/inference/v1/generate",
        headers={"Authorization": f"Bearer {server.api_key}"},
        trust_env=False,
        timeout=300,
        json={
            "token_ids": [20 + (7 * i) % 90 for i in range(11 + 13 * index)],
            "sampling_params": {"n": 4, "seed": index, "max_tokens": 24, "logprobs": 0, "ignore_eos": True},
        },
    )
    assert reply.status_code == 200, reply.text
    return [
        (choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]])
        for choice in sorted(reply.json()["choices"], key=lambda choice: choice["index"])
    ]


def test_a_request_alone_and_among_others_gets_the_same_bits(tmp_path: Path) -> None:
    """Two CPU threads need a repeatable server for this. With one thread every server gives the same bits."""
    settings = ServerSettings(
        dtype="fp32", max_model_len=160, kv_cache_bytes=64 << 20, repeatable=True, cpu_threads=2
    )
    policy = ROOT / "examples" / "arithmetic" / "policy"
    with start_server(policy, settings, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(300)
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            together = list(pool.map(lambda index: sample(server, index), range(NUM_REQUESTS)))
        alone = [sample(server, index) for index in range(NUM_REQUESTS)]
    assert together == alone
    assert all(len(token_ids) == 24 for answers in together for token_ids, _ in answers)
