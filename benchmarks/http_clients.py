"""CPU time of the trainer for its requests to a rollout server: RolloutClient beside httpx's client.

    python benchmarks/http_clients.py [REQUESTS ...]     # at a time; default 32 128 512 2048: two minutes on two cores

A local server answers each request after a random time of up to two seconds with the same 200 tokens, in vLLM's form.
RolloutClient also checks each reply. httpx only sends and receives, so its time is a lower bound for a client on it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import httpx
from aiohttp import web

from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest

PROMPT, ANSWER = 300, 200
"""Tokens of a prompt and of an answer."""
DELAY_S = 2.0
PATH = "/inference/v1/generate"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("requests", type=int, nargs="*", default=[32, 128, 512, 2048])
    chosen = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "httpx"))
    print(f"{', '.join(versions)}; prompts of {PROMPT} tokens, answers of {ANSWER}")
    print(f"{'requests':>8}  {'RolloutClient':>20}  {'httpx':>20}  ratio")
    print(f"{'':>8}  {'CPU s':>9}{'wall s':>11}  {'CPU s':>9}{'wall s':>11}")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    for sample in (sample_with_ours, sample_with_httpx):  # imports and connections of the first time
        sample(url, 1)
    for number in chosen.requests:
        (cpu, wall), (their_cpu, their_wall) = (
            measured(sample, url, number) for sample in (sample_with_ours, sample_with_httpx)
        )
        print(
            f"{number:8d}  {cpu:9.2f}{wall:11.2f}  {their_cpu:9.2f}{their_wall:11.2f}  {their_cpu / cpu:5.1f}",
            flush=True,
        )
    server.terminate()


def measured(sample: Callable[[str, int], None], url: str, number: int) -> tuple[float, float]:
    """(CPU seconds, seconds) of this process for ``number`` requests at a time."""
    cpu, begun = time.process_time(), time.monotonic()
    sample(url, number)
    return time.process_time() - cpu, time.monotonic() - begun


def sample_with_ours(url: str, number: int) -> None:
    request = GenerateRequest(
        prompt_ids=tuple(range(PROMPT)),
        num_rollouts=1,
        seed=0,
        temperature=1.0,
        max_tokens=ANSWER,
        stop_token_ids=(0,),
    )
    client = RolloutClient(url, "key")
    assert len(client.generate([request] * number, version=7, deadline_s=600)) == number
    client.close()


def sample_with_httpx(url: str, number: int) -> None:
    body = {"token_ids": list(range(PROMPT)), "sampling_params": {"n": 1, "max_tokens": ANSWER}}

    async def sample() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=None) as http:
            replies = await asyncio.gather(*(http.post(url + PATH, json=body) for _ in range(number)))
            assert all(reply.status_code == 200 for reply in replies)

    asyncio.run(sample())


def serve(parent: Connection) -> None:
    """Answer requests until the process is ended; send the port to ``parent``."""
    tokens = list(range(1, ANSWER + 1))
    choice = {
        "index": 0,
        "token_ids": tokens,
        "finish_reason": "length",
        "stop_reason": None,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.123456789} for token in tokens]},
        "weight_versions": [{"version": "7", "start": 0, "end": ANSWER}],
    }
    reply = json.dumps({"prompt_token_ids": list(range(PROMPT)), "choices": [choice]}).encode()

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(random.random() * DELAY_S)
        return web.Response(body=reply, content_type="application/json")

    async def run() -> None:
        application = web.Application()
        application.router.add_post(PATH, answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        parent.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main()
