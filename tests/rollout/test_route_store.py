"""Routes that a real server keeps are those that it would send, bit for bit, and its memory for them is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_chord.families.table import read_shape
from megatron_chord.records import Prompt, Rollout, RolloutRequest
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest, RolloutError
from megatron_chord.rollout.route_reader import read_routes
from megatron_chord.rollout.route_store import MEMORY_VARIABLE, PATH, RELEASE
from megatron_chord.rollout.server import RolloutServer, ServerSettings, start_server
from megatron_chord.routes import RemoteRoutes, RouteShape
from megatron_chord.sampling.context import DrawnPrompt
from megatron_chord.sampling.recorded import rollout_json, rollout_of
from megatron_chord.sampling.rounds import Sampling, sample
from megatron_chord.train.remote_routes import (
    drawn_with_routes_here,
    json_with_routes_here,
    json_with_routes_that_exist,
)
from tests.rollout.helpers import START_S, VOCAB, answers_of, client_of, requests
from tests.support.tiny import save_model

DEADLINE_S = 240.0
MEMORY = 40_000
"""Bytes of routes that the server keeps at most. A token has 2 layers x 2 experts x 1 byte."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a CPU vLLM's attention has no kernel for heads of size 16."""
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "layers": 2,
        "vocab": VOCAB,
    }
    return save_model("qwen3_moe", tmp_path_factory.mktemp("policy"), **sizes)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    settings = ServerSettings(
        dtype="fp32", max_model_len=512, kv_cache_bytes=64 << 20, routes=True, repeatable=True
    )
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MEMORY_VARIABLE, str(MEMORY))
        started = start_server(folder, settings, log=log)
    with started as server:
        server.wait_until_ready(START_S)
        yield server


@pytest.fixture
def client(server: RolloutServer) -> Iterator[RolloutClient]:
    client = client_of(server)
    client.release_routes(through=None)
    yield client
    client.close()


@pytest.fixture(scope="module")
def shape(folder: Path) -> RouteShape:
    found = read_shape(folder).routes
    assert found is not None
    return replace(found, is_required=True)


def generated(client: RolloutClient, asked: list[GenerateRequest]) -> list[Rollout]:
    """Sample with the weights that the server was started with."""
    found = answers_of(client, asked, version=None, deadline_s=DEADLINE_S)
    return [rollout for _, group in sorted(found.items()) for rollout in group or ()]


def of_server(server: RolloutServer) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    return httpx.get(server.url + PATH, headers=headers).raise_for_status().json()


def remote_of(rollouts: list[Rollout]) -> list[RemoteRoutes]:
    found = [rollout.routes for rollout in rollouts]
    assert all(isinstance(routes, RemoteRoutes) for routes in found)
    return [routes for routes in found if isinstance(routes, RemoteRoutes)]


def test_kept_routes_are_those_of_a_reply(
    server: RolloutServer, client: RolloutClient, shape: RouteShape
) -> None:
    sent = generated(client, [replace(request, routes=shape) for request in requests(3)])
    assert of_server(server)["num_bytes"] == 0
    asked = [replace(request, routes=shape, keep_routes_for=4 + i) for i, request in enumerate(requests(3))]
    kept = generated(client, asked)
    remote = remote_of(kept)
    read = read_routes(remote, {server.url: server.api_key})
    assert len(read) == 12
    for there, here, routes in zip(kept, sent, remote, strict=True):
        assert there.token_ids == here.token_ids
        assert isinstance(here.routes, np.ndarray)
        found = routes.here(read)
        assert found.dtype == here.routes.dtype
        np.testing.assert_array_equal(found, here.routes)
        assert len(np.unique(found)) > 1, "not only one expert"
        np.testing.assert_array_equal(routes[2:7].here(read), here.routes[2:7])
    total = sum(len(rollout.routes) * 2 * 2 for rollout in sent if rollout.routes is not None)
    assert of_server(server)["num_bytes"] == total
    assert of_server(server)["store"] == client.route_store()

    client.release_routes(through=5)
    read_routes(remote[8:], {server.url: server.api_key})
    with pytest.raises(RolloutError, match=rf"routes of 12 answers from {server.url}: HTTP 404"):
        read_routes(remote, {server.url: server.api_key})
    client.release_routes(through=6)
    assert of_server(server)["num_bytes"] == 0


def test_a_continued_answer_has_pieces_of_both_requests(
    server: RolloutServer, client: RolloutClient, shape: RouteShape
) -> None:
    """As long as nothing is pushed, clients accept no version but that of the start, so no version is asked for."""
    prompt = Prompt(id="0", messages=(), truth="", token_ids=tuple(range(20, 50)))

    def whole(step: int | None) -> Any:
        def ask(prompt_ids: tuple[int, ...], first_routed: int, max_tokens: int) -> Rollout:
            request = GenerateRequest(
                prompt_ids=prompt_ids,
                num_rollouts=1,
                seed=3,
                temperature=1.0,
                max_tokens=max_tokens,
                stop_token_ids=(1,),
                routes=shape,
                keep_routes_for=step,
                first_routed=first_routed,
            )
            return generated(client, [request])[0]

        first = ask(prompt.token_ids, 0, 6)
        assert first.routes is not None
        stopped = replace(first, finish_reason="abort")
        rest = ask(prompt.token_ids + first.token_ids, len(first.routes), 20)
        fake = Answering([(rest,)])
        sampling = Sampling(
            num_rollouts=1, temperature=1.0, max_tokens=26, stop_token_ids=(1,), routes=shape, step=step
        )
        again = RolloutRequest(prompt=prompt, seed=3, partial_rollouts=(stopped,))
        return sample([fake], [again], sampling, version=0, deadline_s=1)[0][0]  # type: ignore[list-item]

    inline, kept = whole(None), whole(0)
    assert isinstance(inline.routes, np.ndarray)
    (remote,) = remote_of([kept])
    assert len(remote.kept()) == 2
    assert len(remote) == len(inline.routes) == 30 + len(inline.token_ids) - 1
    read = read_routes([remote], {server.url: server.api_key})
    np.testing.assert_array_equal(remote.here(read), inline.routes)
    np.testing.assert_array_equal(remote[30:40].here(read), inline.routes[30:40])


class Answering:
    """Answers what a server has answered before."""

    def __init__(self, answers: list[tuple[Rollout, ...]]) -> None:
        self._answers = answers

    def generate(self, *args: Any, **kwargs: Any) -> list[tuple[Rollout, ...]]:
        return self._answers


def test_rank_0_reads_what_it_keeps_longer_than_a_step(
    server: RolloutServer, client: RolloutClient, shape: RouteShape
) -> None:
    """Unfinished answers, a method's memory, and the answers in a checkpoint, of which some may be lost."""
    keys = {server.url: server.api_key}
    (request,) = [replace(requests(1)[0], num_rollouts=2, routes=shape)]
    sent = [rollout.routes for rollout in generated(client, [request])]
    first, second = (generated(client, [replace(request, keep_routes_for=step)]) for step in (0, 1))
    prompt = Prompt(id="0", messages=(), truth="", token_ids=request.prompt_ids)
    drawn = DrawnPrompt(prompt=prompt, position=3, partial_rollouts=tuple(first))
    (found,) = drawn_with_routes_here([drawn], keys)
    assert found == drawn
    for rollout, expected in zip(found.partial_rollouts, sent, strict=True):
        np.testing.assert_array_equal(rollout.routes, expected)
    assert drawn_with_routes_here([found], {}) == (found,), "nothing is read again"

    answers = {"groups": [[rollout_json(first[0])], [rollout_json(second[1])]], "step": 1}
    state = json_with_routes_here(answers, keys)
    np.testing.assert_array_equal(state["groups"][0][0]["routes"], sent[0])
    np.testing.assert_array_equal(state["groups"][1][0]["routes"], sent[1])
    assert json_with_routes_that_exist(answers, keys)[1] == 0
    client.release_routes(through=0)
    with pytest.raises(RolloutError):
        json_with_routes_here(answers, keys)
    state, lost = json_with_routes_that_exist(answers, keys)
    assert lost == 1
    assert state["groups"][0][0]["routes"] is None
    np.testing.assert_array_equal(state["groups"][1][0]["routes"], sent[1])
    assert rollout_of(state["groups"][0][0]).routes is None


def test_memory_is_bounded_and_a_full_one_sends_routes(
    server: RolloutServer, client: RolloutClient, shape: RouteShape
) -> None:
    (request,) = [replace(requests(4)[3], routes=shape, keep_routes_for=0, num_rollouts=1)]
    ids = tuple(range(3, 253)) + tuple(range(3, 153))
    big = [replace(request, prompt_ids=ids, max_tokens=2, seed=seed) for seed in range(40)]
    found = [rollout.routes for rollout in generated(client, big)]
    kept = [routes for routes in found if isinstance(routes, RemoteRoutes)]
    sent = [routes for routes in found if isinstance(routes, np.ndarray)]
    assert len(kept) + len(sent) == 40
    assert 20 <= len(kept) <= 30, "of 1,600 or 1,604 bytes each"
    assert MEMORY - 1_604 < of_server(server)["num_bytes"] <= MEMORY
    assert all(len(routes) in (400, 401) for routes in sent)
    client.release_routes(through=0)
    assert isinstance(generated(client, big[:1])[0].routes, RemoteRoutes), "there is room again"


def test_routes_need_the_key_and_evaluations_get_none(
    server: RolloutServer, client: RolloutClient, shape: RouteShape
) -> None:
    for method, path in (("GET", PATH), ("POST", PATH), ("POST", RELEASE)):
        assert httpx.request(method, server.url + path, json={"keys": []}).status_code == 401
    headers = {"Authorization": f"Bearer {server.api_key}"}
    for path, body in ((PATH, b"{"), (PATH, b'{"keys": 3}'), (RELEASE, b'{"through": "x"}'), (PATH, b"[]")):
        assert httpx.post(server.url + path, content=body, headers=headers).status_code == 400
    assert httpx.delete(server.url + PATH, headers=headers).status_code == 405
    (rollout, *_) = generated(client, requests(1))
    assert rollout.routes is None
    assert of_server(server)["num_bytes"] == 0
    body = {
        "model": "policy",
        "token_ids": [5, 6, 7],
        "sampling_params": {"max_tokens": 2, "detokenize": False},
    }

    def experts(**wish: str) -> Any:
        reply = httpx.post(
            f"{server.url}/inference/v1/generate", json=body, headers=headers | wish, timeout=60
        )
        return reply.raise_for_status().json()["choices"][0]["routed_experts"]

    assert experts() is not None
    assert experts(**{"megatron-chord-routes": "left out"}) is None


def test_routes_of_a_lost_server_cannot_be_read(folder: Path, shape: RouteShape, tmp_path: Path) -> None:
    settings = ServerSettings(dtype="fp32", max_model_len=512, kv_cache_bytes=64 << 20, routes=True)
    with start_server(folder, settings, log=tmp_path / "vllm.log") as server:
        server.wait_until_ready(START_S)
        client = client_of(server)
        kept = generated(client, [replace(requests(1)[0], routes=shape, keep_routes_for=0)])
        keys = {server.url: server.api_key}
        (routes, *_) = remote_of(kept)
        assert len(routes.here(read_routes([routes], keys))) == len(routes)
        (piece,) = routes.pieces
        wrong = replace(piece.source, checksum=piece.source.checksum ^ 1)  # type: ignore[type-var]
        with pytest.raises(RolloutError, match="the checksum of"):
            read_routes([RemoteRoutes.of(wrong)], keys)  # type: ignore[arg-type]
        server.kill()
        with pytest.raises(RolloutError, match=f"routes of 1 answers from {server.url}"):
            read_routes([routes], keys)
        with pytest.raises(RolloutError, match="the server was replaced"):
            read_routes([routes], {})
        client.close()
